// SPDX-License-Identifier: Apache-2.0
//
// Finds the tensors in the arguments and results of a module's forward().

#ifndef DSD_FRONTENDS_PARALLEL_TENSOR_VISITOR_H_
#define DSD_FRONTENDS_PARALLEL_TENSOR_VISITOR_H_

#include <cstddef>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ATen/core/Tensor.h"

namespace dsd {
namespace internal {

template <class T, class = void>
struct IsTupleLike : std::false_type {};
template <class T>
struct IsTupleLike<T, std::void_t<decltype(std::tuple_size<T>::value)>>
    : std::true_type {};

template <class T, class = void>
struct IsRange : std::false_type {};
template <class T>
struct IsRange<
    T, std::void_t<typename T::value_type, decltype(std::declval<T&>().begin()),
                   decltype(std::declval<T&>().end())>>
    : std::negation<std::is_same<T, typename T::value_type>> {};

template <class T>
struct IsOptional : std::false_type {};
template <class T>
struct IsOptional<std::optional<T>> : std::true_type {};

struct TensorTraits {
  bool holds = false;   // VisitTensors may find a tensor in it
  bool opaque = false;  // there may be one that it cannot see

  constexpr TensorTraits operator|(TensorTraits other) const {
    return {holds || other.holds, opaque || other.opaque};
  }
};

template <class T>
constexpr TensorTraits TraitsOf();

template <class T, std::size_t... kIndex>
constexpr TensorTraits TraitsOfTuple(std::index_sequence<kIndex...>) {
  return (TensorTraits{} | ... | TraitsOf<std::tuple_element_t<kIndex, T>>());
}

template <class T>
constexpr TensorTraits TraitsOf() {
  using U = std::remove_cv_t<std::remove_reference_t<T>>;
  if constexpr (std::is_base_of_v<at::Tensor, U>) {
    return {/*holds=*/true, /*opaque=*/false};
  } else if constexpr (IsOptional<U>::value) {
    return TraitsOf<typename U::value_type>();
  } else if constexpr (IsTupleLike<U>::value) {
    return TraitsOfTuple<U>(
        std::make_index_sequence<std::tuple_size<U>::value>());
  } else if constexpr (IsRange<U>::value) {
    return TraitsOf<typename U::value_type>();
  } else {
    return {/*holds=*/false,
            /*opaque=*/!std::is_arithmetic_v<U> && !std::is_enum_v<U>};
  }
}

// True if T is made of tensors, numbers, enums and optionals, tuples, pairs,
// arrays and containers of these.
template <class T>
inline constexpr bool kIsTransparent = !TraitsOf<T>().opaque;

// Calls visit(at::Tensor&) for every tensor in `value`, undefined ones
// included, through any nesting of optionals, tuples, pairs, arrays and
// containers.
template <class T, class Visit>
void VisitTensors(T& value, Visit&& visit) {
  if constexpr (!TraitsOf<T>().holds) {
    return;
  } else if constexpr (std::is_base_of_v<at::Tensor, T>) {
    visit(static_cast<at::Tensor&>(value));
  } else if constexpr (IsOptional<T>::value) {
    if (value.has_value()) VisitTensors(*value, visit);
  } else if constexpr (IsTupleLike<T>::value) {
    std::apply([&](auto&... item) { (VisitTensors(item, visit), ...); }, value);
  } else {
    for (auto& item : value) VisitTensors(item, visit);
  }
}

}  // namespace internal
}  // namespace dsd

#endif  // DSD_FRONTENDS_PARALLEL_TENSOR_VISITOR_H_
