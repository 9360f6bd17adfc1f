#!/usr/bin/env python3
"""Write what documents show but nobody types: tables computed from configurations, pictures of measured data.

    tools/make_docs.py            the tables between `<!-- table NAME -->` and `<!-- end -->`, docs/api.md, the pictures
    tools/make_docs.py --check    change nothing; exit code 1 if a table, a page or a picture's data is another one

Pictures need matplotlib. Each holds a digest of the numbers that it draws: what is compared is data, not pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import api_page
import bench_peers
import jsonl
from deepcalm import geometry
from deepcalm.drafting import CostModel
from deepcalm.files import config as hf_config
from deepcalm.measure import synthetic

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NAMES = {"v2-lite": "DeepSeek-V2-Lite", "v3": "DeepSeek-V3", "glm-4.7-flash": "GLM-4.7-Flash"}
MACHINES = {"Intel Xeon, 2 cores": DOCS / "perf", "AMD EPYC (Zen 4), 2 cores": DOCS / "perf" / "zen4"}
API = DOCS / "api.md"
CACHE_BYTES = 2  # of a number in a cache: f16, the default
Row = Sequence[str]


def config_of(name: str) -> dict[str, Any]:
    """The normalised configuration of a preset."""
    raw, _ = synthetic.make_config(name)
    return hf_config.normalise(raw, {}, min(raw.get("num_nextn_predict_layers", 0), 1), name)


def cost_of(config: dict[str, Any]) -> CostModel:
    """The cost model of drafting in parameters, as if all formats were one."""
    p, expert = geometry.parameters(config), 3 * config["hidden_size"] * config["moe_intermediate_size"]
    return CostModel(
        plain=p.active,
        expert=expert,
        mtp_step=p.mtp_active + config["vocab_size"] * config["hidden_size"],
        mtp_expert=expert,
        layers=config["num_hidden_layers"] - config["first_k_dense_replace"],
        top_k=config["num_experts_per_tok"],
        n_experts=config["n_routed_experts"],
    )


# ---- tables


def cache_table() -> list[Row]:
    rows: list[Row] = [("", "", "MHA", f"GQA, {geometry.GROUPS} groups", "MQA", "MLA")]
    for name in ("v2-lite", "v3"):
        c = config_of(name)
        values = [a.values for a in geometry.attentions(c)]
        token = [CACHE_BYTES * c["num_hidden_layers"] * v for v in values]
        context = c["max_position_embeddings"]
        rows += [
            (f"{NAMES[name]}, {c['num_attention_heads']} heads", "numbers a position and layer",
             *(f"{v:,}" for v in values)),
            ("", f"a token, {c['num_hidden_layers']} layers", *(f"{b / 1e3:,.1f} kB" for b in token)),
            ("", f"{context:,} tokens", *(f"{b * context / 1e9:,.1f} GB" for b in token)),
            ("", "beside MLA", *(f"{v / values[-1]:.2f}" for v in values)),
        ]  # fmt: skip
    return rows


def intensity_table() -> list[Row]:
    rows: list[Row] = [("", "", "MHA", f"GQA, {geometry.GROUPS} groups", "MQA", "MLA")]
    for name in ("v2-lite", "v3"):
        c = config_of(name)
        kinds, r, width = geometry.attentions(c), c["kv_lora_rank"], c["qk_nope_head_dim"] + c["v_head_dim"]
        rows += [
            (NAMES[name], "operations a cached position and layer", *(f"{a.operations:,}" for a in kinds)),
            ("", "bytes of it", *(f"{CACHE_BYTES * a.values:,}" for a in kinds)),
            ("", "operations a byte", *(f"{intensity(a):.0f}" for a in kinds)),
            ("", "rows of a pass from which the expanded form has fewer operations", "", "", "",
             f"{math.ceil(r * width / (2 * r - width))}"),
        ]  # fmt: skip
    return rows


def intensity(a: geometry.Attention) -> float:
    return a.operations / (CACHE_BYTES * a.values)


def product_table() -> list[Row]:
    """Parameters of a layer's query and output side, as two matrices each and multiplied into one."""
    rows: list[Row] = [("a layer, million parameters", "W_UK after the query's", "multiplied",
                        "W_UV, then W_O", "multiplied")]  # fmt: skip
    for name in ("v2-lite", "v3"):
        c = config_of(name)
        heads, d, r = c["num_attention_heads"], c["hidden_size"], c["kv_lora_rank"]
        query, dn, dv = c["q_lora_rank"] or d, c["qk_nope_head_dim"], c["v_head_dim"]
        sides = heads * dn * (query + r), heads * query * r, heads * dv * (r + d), heads * d * r
        rows.append((NAMES[name], *(f"{n / 1e6:.1f}" for n in sides)))
    return rows


def experts_table() -> list[Row]:
    rows: list[Row] = [("", "routed", "chosen", "ways to choose", "shared", "width", "dense layer",
                        "parameters", "read a token", "of it routed")]  # fmt: skip
    for name, title in NAMES.items():
        c = config_of(name)
        p, n, k = geometry.parameters(c), c["n_routed_experts"], c["num_experts_per_tok"]
        ways = f"{math.comb(n, k):.1e}".replace("e+", "e")
        rows.append((title, f"{n}", f"{k}", ways, f"{c['n_shared_experts']}", f"{c['moe_intermediate_size']:,}",
                     f"{c['intermediate_size']:,}", f"{p.total / 1e9:.1f} G", f"{p.active / 1e9:.1f} G",
                     f"{p.routed / 1e9:.1f} G"))  # fmt: skip
    return rows


def union_table() -> list[Row]:
    rows: list[Row] = [("", "", *(f"{j} token{'s' if j > 1 else ''}" for j in range(1, 5)))]
    for name in ("v3", "glm-4.7-flash"):
        m = cost_of(config_of(name))
        rows += [
            (NAMES[name], "distinct experts a layer", *(f"{m.union(j) / m.layers:.1f}" for j in range(1, 5))),
            ("", "weights of the pass, of one token's", *(f"{m.verify_bytes(j) / m.plain:.2f}" for j in range(4))),
            ("", "with its drafts", *(f"{m.relative_cost(j):.2f}" for j in range(4))),
        ]
    return rows


def gain_table() -> list[Row]:
    chances = (0.5, 0.6, 0.7, 0.8, 0.9)
    rows: list[Row] = [("", "K", *(f"a = {a}" for a in chances), "pays from a")]
    for name in ("v3", "glm-4.7-flash"):
        m = cost_of(config_of(name))
        for k in (1, 2, 3):
            even = next(a / 100 for a in range(101) if m.gain(k, a / 100) >= 1)
            rows.append((NAMES[name] if k == 1 else "", f"{k}", *(f"{m.gain(k, a):.2f}" for a in chances),
                         f"{even:.2f}"))  # fmt: skip
    return rows


def accepted_table() -> list[Row]:
    """Drafts of the demo model on held-out text, counted: its own kind of stories, the range of other sources."""
    rows: list[Row] = [("K", "own stories: accepted", "tokens a pass", "gain in bytes",
                        "six other sources: accepted", "tokens a pass", "gain in bytes")]  # fmt: skip
    counted = [r | {"acceptance": r["accepted"] / r["drafted"]}
               for r in jsonl.read(DOCS / "perf" / "draft.jsonl")[1:] if r["part"] == "counts"]  # fmt: skip
    for k in sorted({r["k"] for r in counted}):
        cells = [f"{k}"]
        for own in (True, False):
            of = [r for r in counted if r["k"] == k and (r["source"] == "own") == own]
            for key, form in (("acceptance", ".1%"), ("tokens_per_pass", ".2f"), ("bytes_gain", ".3f")):
                ends = [f"{f(r[key] for r in of):{form}}" for f in (min, max)]
                cells.append(" - ".join(dict.fromkeys(ends)))
        rows.append(cells)
    return rows


def drafters_table() -> list[Row]:
    """Drafts of the text itself, counted: how many were accepted, and the gain in bytes by model and drafts a round."""
    found = {(r["text"], r["model"], r["k"]): r for r in jsonl.read(DOCS / "perf" / "zen4" / "drafters.jsonl")[1:]
             if r.get("drafter") == "ngram"}  # fmt: skip
    columns = [("demo", 3), ("demo", 7), ("demo", "auto"), ("V2-Lite", "auto"), ("V3", "auto")]
    rows: list[Row] = [("text", "accepted", *(f"{m}, {k if k == 'auto' else f'K = {k}'}" for m, k in columns))]
    for text in dict.fromkeys(text for text, *_ in found):
        gains = (f"{found[text, model, k]['gain_bytes']:.2f}" for model, k in columns)
        rows.append((f"`{text}`", f"{found[text, 'demo', 3]['acceptance']:.0%}", *gains))
    return rows


SHAPES = {
    "lite27-q8": "DeepSeek-V2-Lite, q8",
    "lite27-q4": "DeepSeek-V2-Lite, q4",
    "lite8-bf16": "its first 8 layers, bf16",
    "lite8-f8": "its first 8 layers, f8",
    "v3s-q4": "DeepSeek-V3, 1 dense + 1 MoE layer, q4",
}


def rows_table(folder: Path) -> list[Row]:
    """Prefill, and decoding without a context and after 4,096 positions, of every model with an f16 cache."""
    rows: list[Row] = [("shape", "threads", "prefill", "of the kernels from L1", "decode", "GB/s", "of the read",
                        "after 4,096", "of the read", "of what is possible")]  # fmt: skip
    for r in jsonl.read(folder / "rows.jsonl")[1:]:
        if r["kv"] != "f16":
            continue
        shape, prefill = SHAPES[r["name"]] if r["threads"] == 1 else "", r["prefill"]
        short, long = (next(d for d in r["decode"] if d["context"] == n) for n in (0, 4096))
        rows.append((
            shape, f"{r['threads']}",
            f"{prefill['rate']['median']:.0f} tok/s", f"{prefill['kernel_share']['median']:.0%}",
            f"{short['rate']['median']:.1f} tok/s", f"{short['bandwidth']['median']:.1f}",
            f"{short['share']['median']:.0%}", f"{long['rate']['median']:.1f} tok/s",
            f"{long['share']['median']:.0%}", f"{long['bound_share']['median']:.0%}",
        ))  # fmt: skip
    return rows


TABLES: dict[str, Callable[[], list[Row]]] = {
    "cache": cache_table, "intensity": intensity_table, "products": product_table, "experts": experts_table,
    "union": union_table, "gain": gain_table, "accepted": accepted_table,
    "drafters": drafters_table,
    "xeon": lambda: rows_table(DOCS / "perf"), "zen4": lambda: rows_table(DOCS / "perf" / "zen4"),
}  # fmt: skip
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)


def with_tables(text: str) -> str:
    """A document with its computed tables as they are now."""

    def table(m: re.Match[str]) -> str:
        head, *rows = TABLES[m[2]]()
        lines = [head, ["---"] * len(head), *rows]
        return m[1] + "".join("| " + " | ".join(row) + " |\n" for row in lines) + m[3]

    return MARKED.sub(table, text)


# ---- pictures: what is drawn, as plain data, and how


def attention_data() -> dict[str, Any]:
    """Of each kind of attention operations a byte and the cache of a full context; the machines' two ceilings."""
    data: dict[str, Any] = {"models": {}, "machines": {}}
    for name in ("v2-lite", "v3"):
        c = config_of(name)
        bytes_each = CACHE_BYTES * c["num_hidden_layers"] * c["max_position_embeddings"]
        data["models"][NAMES[name]] = {a.name: [round(intensity(a), 3), bytes_each * a.values / 1e9]
                                       for a in geometry.attentions(c)}  # fmt: skip
    for machine, folder in MACHINES.items():
        row = next(r for r in jsonl.read(folder / "rows.jsonl") if r.get("key") == "lite27-q8 T=2 f16")
        at_4k = next(d for d in row["decode"] if d["context"] == 4096)
        data["machines"][machine] = {"read": row["read_bandwidth"]["median"], "f32": row["ceilings"]["f32"],
                                     "measured": at_4k["attention_rate"]}  # fmt: skip
    return data


def draw_attention(figure: Any, data: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    kinds = ["MHA", "GQA", "MQA", "MLA"]
    for i, (model, points) in enumerate(data["models"].items()):
        y = [k - 0.2 + 0.4 * i for k in range(4)]
        left.barh(y, [points[k][1] for k in kinds], 0.36, color=f"C{i}", label=model)
        for at, kind in zip(y, kinds, strict=True):
            left.text(points[kind][1] * 1.12, at, f"{points[kind][1]:,.1f} GB", va="center", fontsize=8)
    left.set(xscale="log", xlim=(1, 9000), xlabel="GB of cache for 163,840 tokens, 16 bits a number",
             title="what has to be kept")  # fmt: skip
    left.set_yticks(range(4), kinds)
    left.invert_yaxis()
    left.legend(fontsize=8, loc="lower right")
    x = [2.0 ** (e / 8) for e in range(-8, 73)]
    for i, (machine, m) in enumerate(data["machines"].items()):
        roof = [min(m["read"] * v, m["f32"]) for v in x]
        right.plot(x, roof, "-", color=f"C{i + 2}", label=f"{machine}: {m['read']:.0f} GB/s, f32 {m['f32']:.0f} G op/s")
        mla = data["models"][NAMES["v2-lite"]]["MLA"][0]
        label = "measured: V2-Lite at 4,096 positions" if i == 0 else None
        right.plot([mla], [m["measured"]], "*", color=f"C{i + 2}", markersize=11, label=label)
    for i, points in enumerate(data["models"].values()):
        for kind in kinds:
            right.axvline(points[kind][0], color=f"C{i}", linewidth=0.8, linestyle=":")
            right.text(points[kind][0] * 1.04, (14, 8.6)[i], kind, fontsize=7, color=f"C{i}", rotation=90)
    right.set(xscale="log", yscale="log", xlim=(0.5, 512), ylim=(8, 3000), xlabel="operations a byte of cache read",
              ylabel="G operations a second", title="what a machine makes of it")  # fmt: skip
    right.legend(fontsize=7, loc="upper left")


def drafting_data() -> dict[str, Any]:
    """Gain by acceptance for K = 1 to 3, and the measured rounds beside what was predicted for them."""
    chances = [a / 20 for a in range(8, 21)]
    curves = {NAMES[n]: {k: [round(cost_of(config_of(n)).gain(k, a), 4) for a in chances] for k in (1, 2, 3)}
              for n in ("v3", "glm-4.7-flash")}  # fmt: skip
    rows = [r for r in jsonl.read(DOCS / "perf" / "draft.jsonl")[1:] if r["part"] == "speed"]
    measured = [[r["file"], r["k"], r["predicted"], r["speedup"]["median"]] for r in rows]
    return {"acceptance": chances, "gain": curves, "measured": measured}


def draw_drafting(figure: Any, data: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    for i, (model, curves) in enumerate(data["gain"].items()):
        for k, gains in curves.items():
            left.plot(data["acceptance"], gains, ["-", "--", ":"][int(k) - 1], color=f"C{i}", label=f"{model}, K = {k}")
    left.axhline(1, color="0.4", linewidth=0.8)
    left.set(xlabel="acceptance of a draft", ylabel="speed over plain decoding", title="predicted from bytes")
    left.legend(fontsize=7)
    files = list(dict.fromkeys(f for f, *_ in data["measured"]))
    for i, f in enumerate(files):
        points = [(p, m) for name, _, p, m in data["measured"] if name == f]
        right.plot(*zip(*points, strict=True), "o", color=f"C{i + 2}", markersize=4, label=f)
    right.plot([0.4, 1.25], [0.4, 1.25], "-", color="0.4", linewidth=0.8)
    right.set(xlabel="predicted from times of rounds", ylabel="measured", title="Intel Xeon, 2 cores, 2 threads")
    right.legend(fontsize=7)


def peers_data(folder: Path, threads: Sequence[int] = (1, 2)) -> list[list[Any]]:
    """[case, threads, context, ours, llama.cpp's, ratio, our share, its share] of every decode beside llama.cpp.

    Rates in tokens per second; shares of the speed at which all bytes would come at the pair's read bandwidth.
    """
    out = []
    for row in jsonl.read(folder / "peers.jsonl")[1:]:
        if row["what"] == "decode" and row["peer"] == "llama.cpp" and row["threads"] in threads:
            s = bench_peers.summary(row)
            numbers = (s[k] for k in ("ours", "peer", "ratio", "share", "peer_share"))
            out.append([row["case"], row["threads"], row["context"], *(round(n, 4) for n in numbers)])
    return sorted(out, key=lambda r: (r[1], ("lite27-q4", "lite14-q8", "lite27-q8", "lite8-bf16").index(r[0]), r[2]))


def draw_peers(axes: Any, rows: list[list[Any]], title: str) -> None:
    """Two bars a row: shares of the read bandwidth, with the rates in them."""
    y = range(len(rows))
    axes.barh([i - 0.2 for i in y], [100 * r[6] for r in rows], 0.38, color="C0", label="deepcalm")
    axes.barh([i + 0.2 for i in y], [100 * r[7] for r in rows], 0.38, color="0.8", label="llama.cpp")
    axes.axvline(100, color="C3", linewidth=1, label="every byte at the read bandwidth")
    for i, r in enumerate(rows):
        axes.text(1, i - 0.2, f"{r[3]:.1f} tok/s, {r[5]:.2f} x", va="center", fontsize=7, color="white")
        axes.text(1, i + 0.2, f"{r[4]:.1f} tok/s", va="center", fontsize=7)
    axes.set_yticks(list(y), [f"{r[0].removeprefix('lite').replace('-', ' layers, ')}, after {r[2]}" for r in rows])
    axes.set(xlabel="% of the read bandwidth in the same pair", title=title)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)


def speed_data() -> dict[str, list[list[Any]]]:
    """Two threads, no context and the longest: what README shows."""
    return {machine: [r for r in peers_data(folder, (2,)) if r[2] in (0, 4096) and r[0] != "lite27-q8"]
            for machine, folder in MACHINES.items()}  # fmt: skip


def draw_speed(figure: Any, data: dict[str, list[list[Any]]]) -> None:
    panels = figure.subplots(1, len(data), sharex=True)
    for axes, (machine, rows) in zip(panels, data.items(), strict=True):
        draw_peers(axes, rows, machine)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


def draw_threads(figure: Any, rows: list[list[Any]]) -> None:
    panels = figure.subplots(1, 2, sharex=True)
    for axes, threads in zip(panels, (1, 2), strict=True):
        draw_peers(axes, [r for r in rows if r[1] == threads], f"{threads} thread{'s' if threads > 1 else ''}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


Picture = tuple[Callable[[], Any], Callable[[Any, Any], None], tuple[float, float]]
PICTURES: dict[str, Picture] = {
    "docs/attention.svg": (attention_data, draw_attention, (10, 4)),
    "docs/drafting.svg": (drafting_data, draw_drafting, (10, 4)),
    "docs/perf/speed.svg": (speed_data, draw_speed, (10, 3.4)),
    "docs/perf/peers.svg": (lambda: peers_data(DOCS / "perf"), draw_threads, (10, 4.4)),
    "docs/perf/zen4/peers.svg": (lambda: peers_data(DOCS / "perf" / "zen4"), draw_threads, (10, 4.4)),
}


def digest(data: Any) -> str:
    """Of the numbers of a picture, to 4 digits: another libm may differ in the last."""
    return hashlib.sha256(json.dumps(jsonl.rounded(data)).encode()).hexdigest()[:16]


def draw(path: Path, picture: Picture) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    data, how, size = picture
    numbers = data()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name, "axes.spines.top": False,
                                "axes.spines.right": False, "font.size": 9}):  # fmt: skip
        figure = Figure(figsize=size, layout="constrained")
        how(figure, numbers)
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": f"data {digest(numbers)}"})
    path.write_text("".join(line.rstrip() + "\n" for line in path.read_text().splitlines()))


def stale() -> list[str]:
    """Documents whose tables, and pictures whose data, are not what this script makes now."""
    out = [str(p.relative_to(ROOT)) for p in documents() if with_tables(p.read_text()) != p.read_text()]
    if not API.exists() or API.read_text() != api_page.text():
        out.append(str(API.relative_to(ROOT)))
    for name, picture in PICTURES.items():
        path = ROOT / name
        if not path.exists() or f"data {digest(picture[0]())}" not in path.read_text():
            out.append(name)
    return out


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    found = stale()
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    if args.check:
        return int(bool(found))
    API.write_text(api_page.text())
    for path in documents():
        path.write_text(with_tables(path.read_text()))
    for name, picture in PICTURES.items():
        draw(ROOT / name, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
