// Rows of a buffer that someone else keeps.
#pragma once

#include "kernels/format.h"

#include <type_traits>

namespace deepcalm {

template <class T> struct View {
    T* data = nullptr;   // null: absent
    int64_t stride = 0;  // elements from row to row

    DC_CONSTEXPR T* row(int64_t i) const { return data + i * stride; }
    DC_CONSTEXPR View from(int64_t i) const { return {row(i), stride}; }       // the rows from i on
    DC_CONSTEXPR View columns(int64_t j) const { return {data + j, stride}; }  // the columns from j on
    template <class U>
        requires(std::is_same_v<U, const T> && !std::is_const_v<T>)
    constexpr operator View<U>() const {  // NOLINT: implicit on purpose
        return {data, stride};
    }
};

}  // namespace deepcalm
