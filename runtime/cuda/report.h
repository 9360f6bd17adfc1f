// Measurements of a session: read bandwidth, a whole pass, its stages. Included by backend.cu alone.
#pragma once

namespace {

// The yardstick: every byte of a buffer read once with 16-byte loads, summed so that nothing is left out.
struct alignas(16) Words {
    uint32_t x, y, z, w;
};
DC_KERNEL(512, 3) kernel_read(const Words* data, int64_t n, uint32_t* out) {
    uint32_t sum = 0;
    for (int64_t i = rt::grid_thread(); i < n; i += rt::grid_threads()) {
        const Words v = data[i];
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 0x12345678U) *out = sum;  // never known to be false
}

}  // namespace

template <class... A> void add(std::string& json, const char* format, A... args) {
    char text[1000];
    std::snprintf(text, sizeof text, format, args...);
    json += text;
}

// The best of `repeats` times of what queue() queues, in seconds.
Result<double> OnDevice::seconds(int repeats, const std::function<rt::Error()>& queue) {
    rt::Event begin, end;
    const rt::Settled settled{stream};
    double best = 1e30;
    for (int i = 0; i < std::min(repeats, rt::kMaxRepeats); ++i) {
        rt::Error e = begin.record(stream);
        if (e == 0) e = queue();
        if (e == 0) e = end.record(stream);
        if (e == 0) e = rt::synchronize(stream);
        DC_TRY_STATUS(check(e, "measurement"));
        best = std::min(best, end.seconds_since(begin));
    }
    return best;
}

// "device"; "bandwidth:BYTES"; "stages:N:POS", a main pass of N <= 8 rows at position POS: seconds of the whole pass and of every
// kind of stage by itself (all layers' stages of that kind in a row, so that weights come from memory and not from the L2
// cache). No report changes what the session computes or shows.
Result<std::string> OnDevice::report(const std::string& what) {
    DC_RT(rt::set_device(m.index));
    std::string json;
    if (what == "device") {
        DC_TRY(const rt::DeviceInfo now, rt::find_device(m.index));
        add(json, "{\"name\": \"%s\", \"arch\": \"%s\", \"sms\": %d, \"smem\": %lld, \"free\": %lld, \"total\": %lld}",
            now.name.c_str(), now.arch.c_str(), now.sms, static_cast<long long>(now.smem),
            static_cast<long long>(now.free), static_cast<long long>(now.total));
        return json;
    }
    if (what.starts_with("bandwidth:")) {
        const int64_t bytes = std::max<int64_t>(std::atoll(what.c_str() + 10), 1 << 16) / 16 * 16;
        Memory buffer;
        const rt::Settled settled{stream};
        DC_RT(buffer.allocate(bytes));
        DC_RT(rt::zero(buffer.p.get(), bytes, stream));
        DC_TRY(const double t, seconds(7, [&] {
                   return rt::launch(
                       {.grid = 3 * m.info.sms, .block = 512, .smem = 0, .dependent = false, .stream = stream},
                       kernel_read, reinterpret_cast<const Words*>(buffer.p.get()), bytes / 16, b.arrived);
               }));
        add(json, "{\"bytes\": %lld, \"seconds\": %.9g, \"gbps\": %.6g}", static_cast<long long>(bytes), t,
            1e-9 * static_cast<double>(bytes) / t);
        return json;
    }
    int n = 0, pos = 0;
    if (std::sscanf(what.c_str(), "stages:%d:%d", &n, &pos) != 2 || n < 1 || n > kBlockRows || pos < 0 ||
        pos + n > args.ctx)
        return fail(ErrorCode::kSession, "device report: '%s' is not known", what.c_str());
    if (queued != taken) return fail(ErrorCode::kSession, "device report: rounds of decoding are running");
    // Where the pass writes and a reader of the session looks: kept aside, and put back however this ends.
    struct Kept {
        void* at;
        int64_t stride, bytes, rows, to;
    } kept_rows[] = {
        {b.cache.row(pos), args.ctx * b.cache.row_bytes, n * b.cache.row_bytes, m.cfg.num_hidden_layers, 0},
        {b.x.data, 4 * b.x.stride, 4 * b.x.stride, n, 0},
        {b.h.data, 4 * b.h.stride, 4 * b.h.stride, n, 0},
        {b.logits.data, 4 * b.logits.stride, 4 * b.logits.stride, n, 0},
    };
    int64_t aside_bytes = 0;
    for (Kept& k : kept_rows) {
        k.to = aside_bytes;
        aside_bytes += round_up(k.bytes * k.rows, 256);
    }
    Memory aside;
    const rt::Settled settled{stream};
    DC_RT(aside.allocate(aside_bytes));
    const auto move_rows = [&](bool back) -> rt::Error {
        rt::Error e = 0;
        for (const Kept& k : kept_rows) {
            void* there = aside.p.get() + k.to;
            if (e == 0)
                e = back ? rt::copy_rows(k.at, k.stride, there, k.bytes, k.bytes, k.rows, stream)
                         : rt::copy_rows(there, k.bytes, k.at, k.stride, k.bytes, k.rows, stream);
        }
        return e == 0 ? rt::synchronize(stream) : e;
    };
    DC_RT(move_rows(false));
    Status measured = guarded([&] { return report_stages(n, pos, json); });
    rt::drain(stream);
    closed = true;  // until everything is back
    DC_RT(move_rows(true));
    closed = false;
    DC_TRY_STATUS(std::move(measured));
    return json;
}

// Seconds of a pass of n rows at `pos`, and of its stages by kind.
Status OnDevice::report_stages(int n, int pos, std::string& json) {
    const rt::Settled settled{stream};
    DC_RT(rt::copy(b.pos, &pos, 4, stream));
    Replay whole;
    writer(whole.program).pass(shape(n, false, n, pos + n > kShortContext, false));
    DC_RT(prepare(whole));
    DC_TRY(const double pass, seconds(20, [&] { return whole.graph.launch(stream); }));
    add(json, "{\"rows\": %d, \"pos\": %d, \"seconds\": %.9g, \"stages\": [", n, pos, pass);
    std::map<std::string, Replay> kinds;
    for (const Op& op : whole.program.ops) kinds[op.name].program.ops.push_back(op);
    const char* comma = "";
    for (auto& [name_of, r] : kinds) {
        DC_RT(prepare(r));
        int64_t bytes = 0;
        for (const Op& op : r.program.ops) bytes += op.bytes + int64_t{pos + n} * op.row_bytes;
        DC_TRY(const double t, seconds(20, [&, &r = r] { return r.graph.launch(stream); }));
        add(json, "%s{\"stage\": \"%s\", \"calls\": %zu, \"bytes\": %lld, \"seconds\": %.9g}", comma, name_of.c_str(),
            r.program.ops.size(), static_cast<long long>(bytes), t);
        comma = ", ";
    }
    json += "]}";
    return {};
}
