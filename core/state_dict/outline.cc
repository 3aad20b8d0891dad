// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/outline.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/empty.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "c10/core/ScalarType.h"
#include "dsd/core/base/checked_int.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/placement.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd {
namespace {

// One byte before each node. Numbers are little-endian and of fixed width.
enum class Tag : uint8_t {
  kNone,
  kFalse,
  kTrue,
  kInt,
  kFloat,
  kText,
  kBytes,
  kOpaque,
  kTensor,      // dtype, shape
  kOneElement,  // dtype, shape, the element
  kList,
  kTuple,
  kDict,
  kComplex,
  kWideInt,
  kSet,
  kFrozenSet,
  kMap,
};

constexpr int kMaxDepth = 200;
constexpr int64_t kMaxOutlineBytes = int64_t{1} << 30;

bool IsSentByValue(const Dims& shape) {
  return Box::Whole(shape).num_elements() == 1;
}

class Encoder {
 public:
  absl::Status Encode(const Value& value, int depth) {
    if (depth > kMaxDepth) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the dict is nested more than ", kMaxDepth, " levels deep"));
    }
    if (value.is<None>()) {
      Put(Tag::kNone);
    } else if (const auto* v = value.get_if<bool>()) {
      Put(*v ? Tag::kTrue : Tag::kFalse);
    } else if (const auto* v = value.get_if<int64_t>()) {
      Put(Tag::kInt);
      PutInt(*v);
    } else if (const auto* v = value.get_if<double>()) {
      Put(Tag::kFloat);
      PutDouble(*v);
    } else if (const auto* v = value.get_if<Complex>()) {
      Put(Tag::kComplex);
      PutDouble(v->real());
      PutDouble(v->imag());
    } else if (const auto* v = value.get_if<WideInt>()) {
      Put(Tag::kWideInt);
      PutText(v->bytes);
    } else if (const auto* v = value.get_if<std::string>()) {
      Put(Tag::kText);
      PutText(*v);
    } else if (const auto* v = value.get_if<Bytes>()) {
      Put(Tag::kBytes);
      PutText(v->data);
    } else if (const auto* v = value.get_if<Opaque>()) {
      Put(Tag::kOpaque);
      PutText(v->type_name);
    } else if (const auto* v = value.get_if<TensorValue>()) {
      return EncodeTensor(*v);
    } else if (const auto* v = value.get_if<Value::List>()) {
      Put(Tag::kList);
      return EncodeItems(*v, depth);
    } else if (const auto* v = value.get_if<Value::Tuple>()) {
      Put(Tag::kTuple);
      return EncodeItems(v->items, depth);
    } else if (const auto* v = value.get_if<Value::Set>()) {
      Put(v->is_frozen ? Tag::kFrozenSet : Tag::kSet);
      return EncodeItems(v->items, depth);
    } else if (const auto* v = value.get_if<Value::Map>()) {
      Put(Tag::kMap);
      DSD_RETURN_IF_ERROR(EncodeItems(v->keys, depth));
      return EncodeItems(v->values, depth);
    } else if (const auto* v = value.get_if<StateDict>()) {
      Put(Tag::kDict);
      PutInt(static_cast<int64_t>(v->size()));
      for (size_t i = 0; i < v->size(); ++i) {
        if (const auto* text = std::get_if<std::string>(&v->key(i))) {
          Put(Tag::kText);
          PutText(*text);
        } else {
          Put(Tag::kInt);
          PutInt(std::get<int64_t>(v->key(i)));
        }
        DSD_RETURN_IF_ERROR(Encode(v->value(i), depth + 1))
            << "key \"" << v->key_text(i) << "\"";
      }
    }
    return absl::OkStatus();
  }

  std::string Take() { return std::move(out_); }

 private:
  void Put(Tag tag) { out_.push_back(static_cast<char>(tag)); }
  void PutInt(int64_t v) {
    out_.append(reinterpret_cast<const char*>(&v), sizeof(v));
  }
  void PutDouble(double v) {
    int64_t bits;
    std::memcpy(&bits, &v, sizeof(bits));
    PutInt(bits);
  }
  void PutText(absl::string_view text) {
    PutInt(static_cast<int64_t>(text.size()));
    absl::StrAppend(&out_, text);
  }

  absl::Status EncodeItems(const std::vector<Value>& items, int depth) {
    PutInt(static_cast<int64_t>(items.size()));
    for (const Value& item : items) {
      DSD_RETURN_IF_ERROR(Encode(item, depth + 1));
    }
    return absl::OkStatus();
  }

  absl::Status EncodeTensor(const TensorValue& value) {
    if (!value.is_plain() || !value.defined()) {
      return absl::InvalidArgumentError(
          value.is_plain()
              ? "the tensor is undefined"
              : absl::StrCat(
                    "expected a whole tensor, found a shard of layout ",
                    value.layout().ToString(),
                    "; get the dict with full_state_dict"));
    }
    DSD_ASSIGN_OR_RETURN(const DType dtype, ToDType(value.scalar_type()));
    const Dims shape = value.shape();
    const bool by_value = IsSentByValue(shape);
    Put(by_value ? Tag::kOneElement : Tag::kTensor);
    out_.push_back(static_cast<char>(dtype));
    PutInt(static_cast<int64_t>(shape.size()));
    for (const int64_t extent : shape) PutInt(extent);
    if (!by_value) return absl::OkStatus();
    return TorchToStatus([&] {
      const at::Tensor host =
          value.locals()[0].detach().cpu().resolve_conj().resolve_neg();
      out_.append(static_cast<const char*>(host.data_ptr()), ItemSize(dtype));
    });
  }

  std::string out_;
};

class Decoder {
 public:
  Decoder(absl::string_view bytes, const DeviceMesh& holders)
      : in_(bytes), holders_(holders) {}

  absl::StatusOr<Value> Decode(int depth) {
    if (depth > kMaxDepth) return Malformed("nested too deeply");
    DSD_ASSIGN_OR_RETURN(const uint8_t tag, GetByte());
    switch (static_cast<Tag>(tag)) {
      case Tag::kNone:
        return Value();
      case Tag::kFalse:
        return Value(false);
      case Tag::kTrue:
        return Value(true);
      case Tag::kInt: {
        DSD_ASSIGN_OR_RETURN(const int64_t v, GetInt());
        return Value(v);
      }
      case Tag::kFloat: {
        DSD_ASSIGN_OR_RETURN(const double v, GetDouble());
        return Value(v);
      }
      case Tag::kComplex: {
        DSD_ASSIGN_OR_RETURN(const double real, GetDouble());
        DSD_ASSIGN_OR_RETURN(const double imaginary, GetDouble());
        return Value(Complex(real, imaginary));
      }
      case Tag::kWideInt: {
        DSD_ASSIGN_OR_RETURN(const absl::string_view v, GetText());
        return Value(WideInt{std::string(v)});
      }
      case Tag::kText: {
        DSD_ASSIGN_OR_RETURN(const absl::string_view v, GetText());
        return Value(v);
      }
      case Tag::kBytes: {
        DSD_ASSIGN_OR_RETURN(const absl::string_view v, GetText());
        return Value(Bytes{std::string(v)});
      }
      case Tag::kOpaque: {
        DSD_ASSIGN_OR_RETURN(const absl::string_view v, GetText());
        return Value(Opaque{std::string(v)});
      }
      case Tag::kTensor:
      case Tag::kOneElement:
        return DecodeTensor(static_cast<Tag>(tag));
      case Tag::kList: {
        DSD_ASSIGN_OR_RETURN(std::vector<Value> items, DecodeItems(depth));
        return Value(std::move(items));
      }
      case Tag::kTuple: {
        DSD_ASSIGN_OR_RETURN(std::vector<Value> items, DecodeItems(depth));
        return Value(Value::Tuple{std::move(items)});
      }
      case Tag::kSet:
      case Tag::kFrozenSet: {
        DSD_ASSIGN_OR_RETURN(std::vector<Value> items, DecodeItems(depth));
        return Value(Value::Set{std::move(items),
                                static_cast<Tag>(tag) == Tag::kFrozenSet});
      }
      case Tag::kMap: {
        Value::Map map;
        DSD_ASSIGN_OR_RETURN(map.keys, DecodeItems(depth));
        DSD_ASSIGN_OR_RETURN(map.values, DecodeItems(depth));
        if (map.keys.size() != map.values.size()) {
          return Malformed("a dict with more keys than values, or fewer");
        }
        return Value(std::move(map));
      }
      case Tag::kDict:
        return DecodeDict(depth);
    }
    return Malformed(absl::StrCat("unknown tag ", tag));
  }

  bool AtEnd() const { return in_.empty(); }

  absl::Status Malformed(absl::string_view what) const {
    return absl::DataLossError(
        absl::StrCat("a state dict that was sent does not decode: ", what));
  }

 private:
  absl::StatusOr<uint8_t> GetByte() {
    if (in_.empty()) return Malformed("too short");
    const uint8_t v = static_cast<uint8_t>(in_[0]);
    in_.remove_prefix(1);
    return v;
  }
  absl::StatusOr<int64_t> GetInt() {
    int64_t v;
    if (in_.size() < sizeof(v)) return Malformed("too short");
    std::memcpy(&v, in_.data(), sizeof(v));
    in_.remove_prefix(sizeof(v));
    return v;
  }
  absl::StatusOr<double> GetDouble() {
    DSD_ASSIGN_OR_RETURN(const int64_t bits, GetInt());
    double v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
  }
  // A count of things of at least one byte each.
  absl::StatusOr<size_t> GetCount() {
    DSD_ASSIGN_OR_RETURN(const int64_t count, GetInt());
    if (count < 0 || static_cast<uint64_t>(count) > in_.size()) {
      return Malformed(
          absl::StrCat("count ", count, " with ", in_.size(), " bytes left"));
    }
    return static_cast<size_t>(count);
  }
  absl::StatusOr<absl::string_view> GetText() {
    DSD_ASSIGN_OR_RETURN(const size_t size, GetCount());
    const absl::string_view text = in_.substr(0, size);
    in_.remove_prefix(size);
    return text;
  }

  absl::StatusOr<std::vector<Value>> DecodeItems(int depth) {
    DSD_ASSIGN_OR_RETURN(const size_t count, GetCount());
    std::vector<Value> items;
    for (size_t i = 0; i < count; ++i) {
      DSD_ASSIGN_OR_RETURN(Value item, Decode(depth + 1));
      items.push_back(std::move(item));
    }
    return items;
  }

  absl::StatusOr<Value> DecodeDict(int depth) {
    DSD_ASSIGN_OR_RETURN(const size_t count, GetCount());
    StateDict dict;
    for (size_t i = 0; i < count; ++i) {
      DSD_ASSIGN_OR_RETURN(const Value key, Decode(depth + 1));
      PathSegment segment;
      if (const auto* text = key.get_if<std::string>()) {
        segment = *text;
      } else if (const auto* number = key.get_if<int64_t>()) {
        segment = *number;
      } else {
        return Malformed("a dict key is neither text nor number");
      }
      DSD_ASSIGN_OR_RETURN(Value value, Decode(depth + 1));
      dict.Set(std::move(segment), std::move(value));
    }
    return Value(std::move(dict));
  }

  absl::StatusOr<Value> DecodeTensor(Tag tag) {
    DSD_ASSIGN_OR_RETURN(const uint8_t number, GetByte());
    if (number >= kNumDTypes) return Malformed("unknown element type");
    const DType dtype = static_cast<DType>(number);
    DSD_ASSIGN_OR_RETURN(const size_t ndim, GetCount());
    Dims shape;
    for (size_t d = 0; d < ndim; ++d) {
      DSD_ASSIGN_OR_RETURN(const int64_t extent, GetInt());
      shape.push_back(extent);
    }
    if (!CheckedProduct(shape).has_value()) {
      return Malformed(absl::StrCat("shape ", DimsToString(shape)));
    }
    if (tag == Tag::kOneElement) {
      if (!IsSentByValue(shape)) return Malformed("more than one element");
      const size_t size = ItemSize(dtype);
      if (in_.size() < size) return Malformed("too short");
      DSD_ASSIGN_OR_RETURN(at::Tensor tensor, TorchToStatus([&] {
                             at::Tensor scalar = at::empty(ToIntArrayRef(shape),
                                                           ToScalarType(dtype));
                             std::memcpy(scalar.data_ptr(), in_.data(), size);
                             return scalar;
                           }));
      in_.remove_prefix(size);
      return Value(TensorValue(std::move(tensor)));
    }
    DSD_ASSIGN_OR_RETURN(
        Layout layout,
        Layout::FromPlacements(std::move(shape), holders_, {Replicate()}));
    return Value(
        TensorValue::Elsewhere(std::move(layout), ToScalarType(dtype)));
  }

  absl::string_view in_;
  const DeviceMesh& holders_;
};

}  // namespace

absl::StatusOr<std::string> EncodeOutline(const Value& value) {
  Encoder encoder;
  DSD_RETURN_IF_ERROR(encoder.Encode(value, 0));
  return encoder.Take();
}

absl::StatusOr<Value> DecodeOutline(absl::string_view bytes,
                                    const DeviceMesh& holders) {
  Decoder decoder(bytes, holders);
  DSD_ASSIGN_OR_RETURN(Value value, decoder.Decode(0));
  if (!decoder.AtEnd()) return decoder.Malformed("bytes after the end");
  return value;
}

absl::StatusOr<Value> ShareOutline(const Value& value,
                                   const std::vector<int>& holders,
                                   Communicator& comm,
                                   const CallOptions& call) {
  const int root = holders.front();
  std::string mine;
  if (comm.rank() == root) {
    // The status travels in front, so that an error is everybody's.
    const absl::StatusOr<std::string> outline = EncodeOutline(value);
    mine.push_back(static_cast<char>(outline.status().code()));
    absl::StrAppend(&mine, outline.ok() ? absl::string_view(*outline)
                                        : outline.status().message());
  }
  DSD_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                       comm.AllGatherBlobs(mine, kMaxOutlineBytes, call));
  absl::string_view outline = all[root];
  if (outline.empty()) {
    return absl::DataLossError(
        absl::StrCat("rank ", root, " sent no state dict"));
  }
  const auto code = static_cast<absl::StatusCode>(outline[0]);
  outline.remove_prefix(1);
  if (code != absl::StatusCode::kOk) {
    return absl::Status(
        code, absl::StrCat("state dict of rank ", root, ": ", outline));
  }
  DSD_ASSIGN_OR_RETURN(
      const DeviceMesh mesh,
      DeviceMesh::Create({static_cast<int64_t>(holders.size())},
                         {holders.begin(), holders.end()}));
  DSD_ASSIGN_OR_RETURN(Value shared, DecodeOutline(outline, mesh));
  if (std::find(holders.begin(), holders.end(), comm.rank()) == holders.end()) {
    return shared;
  }
  absl::flat_hash_map<std::string, TensorValue> own;
  Value copy = value;
  ForEachTensor(copy, "", [&](const std::string& path, TensorValue& tensor) {
    own.emplace(path, tensor);
  });
  absl::Status status;
  ForEachTensor(shared, "", [&](const std::string& path, TensorValue& tensor) {
    if (!status.ok()) return;
    const auto it = own.find(path);
    if (it == own.end() || !it->second.is_plain() || !it->second.defined() ||
        it->second.shape() != tensor.shape() ||
        it->second.scalar_type() != tensor.scalar_type()) {
      status = absl::FailedPreconditionError(absl::StrCat(
          "the dict differs from that of rank ", root, ": \"", path,
          "\" there is a whole tensor of type ",
          c10::toString(tensor.scalar_type()), " and shape ",
          DimsToString(tensor.shape()), ", here ",
          it == own.end() ? "it is missing" : "it is something else",
          "; to use the dict of one rank set source_rank"));
    } else if (!tensor.is_plain()) {
      absl::StatusOr<TensorValue> whole = TensorValue::Sharded(
          Sharding{tensor.layout(), comm.rank()}, it->second.locals()[0]);
      status.Update(Annotate(whole.status(), absl::StrCat("\"", path, "\"")));
      if (status.ok()) tensor = *std::move(whole);
    }
    if (it != own.end()) own.erase(it);
  });
  if (status.ok() && !own.empty()) {
    status = absl::FailedPreconditionError(
        absl::StrCat("the dict differs from that of rank ", root,
                     ": there is no \"", own.begin()->first,
                     "\" there; to use the dict of one rank set source_rank"));
  }
  DSD_RETURN_IF_ERROR(status);
  return shared;
}

}  // namespace dsd
