// Failures as values: bad input, the environment, and our own bugs where they can be told. Nothing here ends the process.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <variant>

namespace deepcalm {

// The Python exception class that an error becomes (python/deepcalm/errors.py has the same names).
enum class ErrorCode { kConfig, kPackedFile, kSession, kResource, kUnsupported };

struct Error {
    ErrorCode code;
    std::string message;  // object, found, expected, likely cause; one line
};

template <class T> class [[nodiscard]] Result {
  public:
    Result(T value) : v_(std::in_place_index<0>, std::move(value)) {}      // NOLINT: implicit on purpose
    Result(Error error) : v_(std::in_place_index<1>, std::move(error)) {}  // NOLINT
    bool ok() const { return v_.index() == 0; }
    T& value() { return std::get<0>(v_); }
    const T& value() const { return std::get<0>(v_); }
    Error& error() { return std::get<1>(v_); }

  private:
    std::variant<T, Error> v_;
};

class [[nodiscard]] Status {
  public:
    Status() = default;
    Status(Error error) : error_(std::move(error)) {}  // NOLINT
    bool ok() const { return !error_.has_value(); }
    Error& error() { return *error_; }

  private:
    std::optional<Error> error_;
};

#define DC_CONCAT2(a, b) a##b
#define DC_CONCAT(a, b) DC_CONCAT2(a, b)
// DC_TRY(lhs, expr): lhs = value of the Result, or return its error.
#define DC_TRY(lhs, expr)                                                                                              \
    auto DC_CONCAT(dc_result_, __LINE__) = (expr);                                                                     \
    if (!DC_CONCAT(dc_result_, __LINE__).ok()) return std::move(DC_CONCAT(dc_result_, __LINE__).error());              \
    lhs = std::move(DC_CONCAT(dc_result_, __LINE__).value())
#define DC_TRY_STATUS(expr)                                                                                            \
    if (auto dc_status = (expr); !dc_status.ok()) return std::move(dc_status.error())

}  // namespace deepcalm
