// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/dcp/object_item.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "dsd/core/base/checked_int.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/dcp/memory_file.h"
#include "dsd/frontends/checkpoint/dcp/pickle_reader.h"
#include "dsd/frontends/checkpoint/dcp/pickle_writer.h"
#include "dsd/frontends/checkpoint/dcp/tensor_item.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"

namespace dsd::dcp {
namespace {

using Kind = PickleValue::Kind;

constexpr int64_t kMaxRecords = 1'000'000;
// Besides the few other records.
constexpr int64_t kMaxTensors = kMaxRecords - 16;
// Shared values are written out as often as they occur, so the tree may be far
// larger than its pickle: an honest one is not by so much.
constexpr int64_t kMaxValuesPerByte = 4;
constexpr int64_t kFreeValues = 1 << 16;
constexpr int64_t kMaxValues = int64_t{1} << 26;
constexpr int64_t kFreeBytes = 1 << 20;

// Python 2's name of the module, which protocol 2 uses.
bool IsBuiltin(PickleValue global, absl::string_view name) {
  return global.IsGlobal("builtins", name) ||
         global.IsGlobal("__builtin__", name);
}

std::string ClassName(PickleValue global) {
  if (global.kind() != Kind::kGlobal) return "object";
  if (global.module() == "builtins" || global.module() == "__builtin__") {
    return absl::CHexEscape(global.name());
  }
  return absl::CHexEscape(absl::StrCat(global.module(), ".", global.name()));
}

// Two's complement without bytes that only repeat the sign.
std::string ShortestInt(absl::string_view bytes) {
  while (bytes.size() > 1) {
    const bool is_negative = (bytes[bytes.size() - 2] & 0x80) != 0;
    if (bytes.back() != (is_negative ? '\xff' : '\0')) break;
    bytes.remove_suffix(1);
  }
  return std::string(bytes);
}

// The number, if it is one of 64 bits.
std::optional<int64_t> FitsInt(absl::string_view shortest) {
  if (shortest.size() > sizeof(int64_t)) return std::nullopt;
  int64_t value = !shortest.empty() && (shortest.back() & 0x80) ? -1 : 0;
  std::memcpy(&value, shortest.data(), shortest.size());
  return value;
}

// Into the order of their pickles, each once; false if one of them has none.
bool SortItems(std::vector<Object>* items) {
  std::vector<std::pair<std::string, Object>> sorted;
  for (Object& item : *items) {
    absl::StatusOr<ObjectPickle> pickle = EncodeObjectPickle(item);
    if (!pickle.ok() || !pickle->storages.empty()) return false;
    sorted.emplace_back(std::move(pickle->pickle), std::move(item));
  }
  std::sort(sorted.begin(), sorted.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  items->clear();
  for (size_t i = 0; i < sorted.size(); ++i) {
    if (i > 0 && sorted[i].first == sorted[i - 1].first) continue;
    items->push_back(std::move(sorted[i].second));
  }
  return true;
}

constexpr absl::string_view kTorchPrefix = "torch.";

// Whether Python takes it as a key of a dict.
bool IsKey(const Object& value) {
  if (const auto* tuple = value.get_if<Object::Tuple>()) {
    return std::all_of(tuple->items.begin(), tuple->items.end(), IsKey);
  }
  if (const auto* set = value.get_if<Object::Set>()) return set->is_frozen;
  if (const auto* opaque = value.get_if<Opaque>()) {
    return IsTorchDType(opaque->type_name);
  }
  return !value.is_container() && !value.is<Object::Map>() &&
         !value.is<HostTensor>();
}

class ObjectDecoder {
 public:
  ObjectDecoder(ObjectBudget* budget, const ReadTensorFn& read_tensor)
      : budget_(*budget), read_tensor_(read_tensor) {}

  absl::StatusOr<Object> Decode(PickleValue value, int depth = 0) {
    if (depth > kMaxObjectDepth) {
      return absl::DataLossError(absl::StrCat(
          "stored object: nested more than ", kMaxObjectDepth, " deep"));
    }
    DSD_RETURN_IF_ERROR(Spend(0));
    switch (value.kind()) {
      case Kind::kNone:
        return Object();
      case Kind::kBool:
        return Object(*value.AsBool());
      case Kind::kInt:
        return Object(*value.AsInt());
      case Kind::kBigInt:
        return DecodeBigInt(*value.AsBigInt());
      case Kind::kFloat:
        return Object(*value.AsFloat());
      case Kind::kString:
        DSD_RETURN_IF_ERROR(Spend(value.AsString()->size()));
        return Object(*value.AsString());
      case Kind::kBytes:
        DSD_RETURN_IF_ERROR(Spend(value.AsBytes()->size()));
        return Object(Bytes{std::string(*value.AsBytes())});
      case Kind::kTuple: {
        Object::Tuple tuple;
        DSD_RETURN_IF_ERROR(DecodeItems(value, depth, &tuple.items));
        return Object(std::move(tuple));
      }
      case Kind::kList: {
        Object::List list;
        DSD_RETURN_IF_ERROR(DecodeItems(value, depth, &list));
        return Object(std::move(list));
      }
      case Kind::kDict:
        return DecodeDict(value, depth);
      case Kind::kSet:
      case Kind::kFrozenSet:
        return DecodeSet(value, value.kind() == Kind::kFrozenSet, depth);
      case Kind::kGlobal:
        return Object(Opaque{ClassName(value)});
      case Kind::kPersistentId:
        return Object(Opaque{"torch.Storage"});
      case Kind::kCall:
        return DecodeCall(value, depth);
      case Kind::kInstance:
        return Object(Opaque{ClassName(value.callee())});
    }
    return absl::InternalError("stored object: unknown kind");
  }

 private:
  absl::Status Spend(size_t bytes) {
    budget_.bytes_left -= static_cast<int64_t>(bytes);
    if (--budget_.values_left < 0 || budget_.bytes_left < 0) {
      return absl::ResourceExhaustedError(
          "stored object: it unfolds to more values than its bytes have room "
          "for, or to more than 67 million");
    }
    return absl::OkStatus();
  }

  absl::Status DecodeItems(PickleValue value, int depth,
                           std::vector<Object>* out) {
    absl::Status status;
    value.ForEachItem([&](PickleValue item) {
      absl::StatusOr<Object> decoded = Decode(item, depth + 1);
      status = decoded.status();
      if (status.ok()) out->push_back(*std::move(decoded));
      return status.ok();
    });
    return status;
  }

  absl::StatusOr<Object> DecodeDict(PickleValue value, int depth) {
    bool plain = true;
    value.ForEachEntry([&](PickleValue key, PickleValue) {
      plain = key.AsString().has_value() || key.AsInt().has_value();
      return plain;
    });
    if (!plain) return DecodeMap(value, depth);
    Object::Dict dict;
    absl::Status status;
    value.ForEachEntry([&](PickleValue key, PickleValue item) {
      std::optional<PathSegment> segment;
      if (const auto text = key.AsString()) {
        status = Spend(text->size());
        segment = std::string(*text);
      } else {
        segment = *key.AsInt();
      }
      if (!status.ok()) return false;
      absl::StatusOr<Object> decoded = Decode(item, depth + 1);
      status = decoded.status();
      if (!status.ok()) return false;
      dict.Set(*std::move(segment), *std::move(decoded));
      return true;
    });
    DSD_RETURN_IF_ERROR(status);
    return Object(std::move(dict));
  }

  // With keys of other types; the last value of a key counts.
  absl::StatusOr<Object> DecodeMap(PickleValue value, int depth) {
    Object::Map map;
    absl::flat_hash_map<std::string, size_t> places;  // by the key's pickle
    absl::Status status;
    bool is_data = true;
    value.ForEachEntry([&](PickleValue key_value, PickleValue item_value) {
      absl::StatusOr<Object> key = Decode(key_value, depth + 1);
      absl::StatusOr<Object> item = Decode(item_value, depth + 1);
      status.Update(key.status());
      status.Update(item.status());
      if (!status.ok()) return false;
      const auto pickle = EncodeObjectPickle(*key);
      is_data = pickle.ok() && IsKey(*key);
      if (!is_data) return false;
      const auto [place, is_new] =
          places.try_emplace(pickle->pickle, map.keys.size());
      if (is_new) {
        map.keys.push_back(*std::move(key));
        map.values.emplace_back();
      }
      map.values[place->second] = *std::move(item);
      return true;
    });
    DSD_RETURN_IF_ERROR(status);
    // What is named and inert is no key.
    if (!is_data) return Object(Opaque{"dict"});
    return Object(std::move(map));
  }

  absl::StatusOr<Object> DecodeBigInt(absl::string_view bytes) {
    DSD_RETURN_IF_ERROR(Spend(bytes.size()));
    std::string shortest = ShortestInt(bytes);
    if (const auto number = FitsInt(shortest)) return Object(*number);
    return Object(WideInt{std::move(shortest)});
  }

  absl::StatusOr<Object> DecodeSet(PickleValue items, bool is_frozen,
                                   int depth) {
    Object::Set set;
    set.is_frozen = is_frozen;
    DSD_RETURN_IF_ERROR(DecodeItems(items, depth, &set.items));
    // What is named and inert has no place in an order.
    if (!SortItems(&set.items)) {
      return Object(Opaque{is_frozen ? "frozenset" : "set"});
    }
    return Object(std::move(set));
  }

  absl::StatusOr<Object> DecodeCall(PickleValue call, int depth) {
    const PickleValue function = call.callee();
    if (function.IsGlobal("collections", "OrderedDict")) {
      return DecodeDict(call, depth);
    }
    if (function.IsGlobal("torch", "Size")) {
      const auto args = call.args().AsTuple(1);
      if (args.has_value() && args->size() == 1 &&
          (*args)[0].kind() == Kind::kTuple) {
        return Decode((*args)[0], depth + 1);
      }
    }
    // Bytes, as protocol 2 has them.
    if (function.IsGlobal("_codecs", "encode")) {
      const auto args = call.args().AsTuple(2);
      if (args.has_value() && args->size() == 2) {
        const auto text = (*args)[0].AsString();
        const auto codec = (*args)[1].AsString();
        if (text.has_value() && (codec == "latin1" || codec == "latin-1")) {
          return Latin1(*text);
        }
      }
    }
    for (const bool is_frozen : {false, true}) {
      if (!IsBuiltin(function, is_frozen ? "frozenset" : "set")) continue;
      const auto args = call.args().AsTuple(1);
      if (args.has_value() && args->size() == 1 &&
          (*args)[0].kind() == Kind::kList) {
        return DecodeSet((*args)[0], is_frozen, depth);
      }
    }
    if (IsBuiltin(function, "complex")) {
      const auto args = call.args().AsTuple(2);
      if (args.has_value() && args->size() == 2) {
        const auto real = (*args)[0].AsFloat();
        const auto imaginary = (*args)[1].AsFloat();
        if (real.has_value() && imaginary.has_value()) {
          return Object(Complex(*real, *imaginary));
        }
      }
    }
    if (IsBuiltin(function, "bytes") && call.args().kind() == Kind::kTuple &&
        call.args().size() == 0) {
      return Object(Bytes{});
    }
    if (IsTensorCall(call)) return DecodeTensor(call);
    return Object(Opaque{ClassName(function)});
  }

  absl::StatusOr<Object> DecodeTensor(PickleValue call) {
    if (!read_tensor_) return Object(Opaque{"torch.Tensor"});
    absl::StatusOr<HostTensor> tensor = read_tensor_(call);
    if (absl::IsUnimplemented(tensor.status())) {
      return Object(Opaque{"torch.Tensor"});
    }
    DSD_RETURN_IF_ERROR(tensor.status());
    DSD_RETURN_IF_ERROR(Spend(tensor->bytes().size()));
    return Object(*std::move(tensor));
  }

  absl::StatusOr<Object> Latin1(absl::string_view utf8) {
    DSD_RETURN_IF_ERROR(Spend(utf8.size()));
    Bytes out;
    for (size_t i = 0; i < utf8.size(); ++i) {
      const uint8_t lead = static_cast<uint8_t>(utf8[i]);
      if (lead < 0x80) {
        out.data.push_back(utf8[i]);
        continue;
      }
      if ((lead != 0xC2 && lead != 0xC3) || i + 1 >= utf8.size()) {
        return absl::DataLossError("stored object: bytes that are not latin-1");
      }
      const uint8_t next = static_cast<uint8_t>(utf8[++i]);
      out.data.push_back(static_cast<char>(lead << 6 | (next & 0x3F)));
    }
    return Object(std::move(out));
  }

  ObjectBudget& budget_;
  const ReadTensorFn& read_tensor_;
};

class ObjectEncoder {
 public:
  explicit ObjectEncoder(int64_t first_storage)
      : first_storage_(first_storage), pickle_(2, &out_.pickle) {}

  absl::StatusOr<ObjectPickle> Run(const Object& value) {
    DSD_RETURN_IF_ERROR(Encode(value, 0));
    pickle_.Stop();
    return std::move(out_);
  }

 private:
  absl::Status Encode(const Object& value, int depth) {
    if (depth > kMaxObjectDepth) {
      return absl::InvalidArgumentError(
          absl::StrCat("nested more than ", kMaxObjectDepth, " deep"));
    }
    if (value.is<None>()) {
      pickle_.None();
    } else if (const bool* flag = value.get_if<bool>()) {
      pickle_.Bool(*flag);
    } else if (const int64_t* number = value.get_if<int64_t>()) {
      pickle_.Int(*number);
    } else if (const auto* wide = value.get_if<WideInt>()) {
      return EncodeWideInt(*wide);
    } else if (const double* number = value.get_if<double>()) {
      pickle_.Float(*number);
    } else if (const auto* both = value.get_if<Complex>()) {
      pickle_.Complex(both->real(), both->imag());
    } else if (const std::string* text = value.get_if<std::string>()) {
      return EncodeText(*text);
    } else if (const Bytes* bytes = value.get_if<Bytes>()) {
      pickle_.Bytes(bytes->data);
    } else if (const auto* list = value.get_if<Object::List>()) {
      pickle_.EmptyList();
      if (list->empty()) return absl::OkStatus();
      pickle_.Mark();
      DSD_RETURN_IF_ERROR(EncodeItems(*list, depth));
      pickle_.Appends();
    } else if (const auto* tuple = value.get_if<Object::Tuple>()) {
      if (tuple->items.size() > 3) pickle_.Mark();
      DSD_RETURN_IF_ERROR(EncodeItems(tuple->items, depth));
      pickle_.Tuple(static_cast<int64_t>(tuple->items.size()));
    } else if (const auto* dict = value.get_if<Object::Dict>()) {
      return EncodeDict(*dict, depth);
    } else if (const auto* map = value.get_if<Object::Map>()) {
      return EncodeMap(*map, depth);
    } else if (const auto* set = value.get_if<Object::Set>()) {
      return EncodeSet(*set, depth);
    } else if (const auto* tensor = value.get_if<HostTensor>()) {
      return EncodeTensor(*tensor);
    } else if (const Opaque* opaque = value.get_if<Opaque>();
               opaque != nullptr && IsTorchDType(opaque->type_name)) {
      pickle_.Global("torch",
                     absl::StripPrefix(opaque->type_name, kTorchPrefix));
    } else {
      return absl::InvalidArgumentError(absl::StrCat(
          "a value of class ", value.kind_name(),
          " cannot be written; only None, bool, int, float, complex, str, "
          "bytes, list, tuple, dict, set, frozenset, tensors and torch's "
          "dtypes can"));
    }
    return absl::OkStatus();
  }

  absl::Status EncodeWideInt(const WideInt& value) {
    const std::string shortest = ShortestInt(value.bytes);
    constexpr size_t kMaxBytes = 255;
    if (shortest.size() > kMaxBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("an integer of ", shortest.size(),
                       " bytes, expected at most ", kMaxBytes));
    }
    if (const auto number = FitsInt(shortest)) {
      pickle_.Int(*number);
    } else {
      pickle_.WideInt(shortest);
    }
    return absl::OkStatus();
  }

  absl::Status EncodeText(absl::string_view text) {
    if (!IsUtf8(text) || text.size() > std::numeric_limits<uint32_t>::max()) {
      return absl::InvalidArgumentError(
          absl::StrCat("text \"", absl::CHexEscape(text.substr(0, 64)),
                       "\" is not UTF-8 (or over 4 GiB); use Bytes"));
    }
    pickle_.Text(text);
    return absl::OkStatus();
  }

  absl::Status EncodeItems(const std::vector<Object>& items, int depth) {
    for (const Object& item : items) {
      DSD_RETURN_IF_ERROR(Encode(item, depth + 1));
    }
    return absl::OkStatus();
  }

  absl::Status EncodeDict(const Object::Dict& dict, int depth) {
    pickle_.EmptyDict();
    if (dict.empty()) return absl::OkStatus();
    pickle_.Mark();
    for (size_t i = 0; i < dict.size(); ++i) {
      if (const auto* key = std::get_if<std::string>(&dict.key(i))) {
        DSD_RETURN_IF_ERROR(EncodeText(*key));
      } else {
        pickle_.Int(std::get<int64_t>(dict.key(i)));
      }
      DSD_RETURN_IF_ERROR(Encode(dict.value(i), depth + 1));
    }
    pickle_.SetItems();
    return absl::OkStatus();
  }

  absl::Status EncodeMap(const Object::Map& map, int depth) {
    if (map.keys.size() != map.values.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("a dict of ", map.keys.size(), " keys and ",
                       map.values.size(), " values"));
    }
    pickle_.EmptyDict();
    if (map.keys.empty()) return absl::OkStatus();
    pickle_.Mark();
    for (size_t i = 0; i < map.keys.size(); ++i) {
      if (!IsKey(map.keys[i])) {
        return absl::InvalidArgumentError(
            absl::StrCat("a key of a dict is ", map.keys[i].kind_name(),
                         ", which Python does not take for one"));
      }
      DSD_RETURN_IF_ERROR(Encode(map.keys[i], depth + 1));
      DSD_RETURN_IF_ERROR(Encode(map.values[i], depth + 1));
    }
    pickle_.SetItems();
    return absl::OkStatus();
  }

  // As SortItems has them.
  absl::Status EncodeSet(const Object::Set& set, int depth) {
    pickle_.Global("__builtin__", set.is_frozen ? "frozenset" : "set");
    pickle_.EmptyList();
    std::vector<std::string> items;
    const size_t begin = out_.pickle.size();
    const size_t tensors = out_.storages.size();
    for (const Object& item : set.items) {
      DSD_RETURN_IF_ERROR(Encode(item, depth + 1));
      items.push_back(out_.pickle.substr(begin));
      out_.pickle.resize(begin);
    }
    if (out_.storages.size() != tensors) {
      return absl::InvalidArgumentError("a tensor in a set");
    }
    std::sort(items.begin(), items.end());
    items.erase(std::unique(items.begin(), items.end()), items.end());
    if (!items.empty()) {
      pickle_.Mark();
      for (const std::string& item : items) out_.pickle += item;
      pickle_.Appends();
    }
    pickle_.Tuple(1);
    pickle_.Reduce();
    return absl::OkStatus();
  }

  absl::Status EncodeTensor(const HostTensor& tensor) {
    const std::vector<int64_t> shape = tensor.shape();
    const auto elements = CheckedProduct(shape);
    const auto bytes = elements.has_value()
                           ? CheckedMul(*elements, ItemSize(tensor.dtype()))
                           : std::nullopt;
    if (bytes != static_cast<int64_t>(tensor.bytes().size())) {
      return absl::InvalidArgumentError(absl::StrCat(
          "a tensor of shape ", DimsToString(Dims(shape.begin(), shape.end())),
          " and dtype ", DTypeName(tensor.dtype()), " with ",
          tensor.bytes().size(), " bytes of elements"));
    }
    const auto storage = static_cast<int64_t>(out_.storages.size());
    WriteTensor(pickle_, tensor.dtype(), shape,
                absl::StrCat(first_storage_ + storage));
    out_.storages.push_back(tensor);
    return absl::OkStatus();
  }

  const int64_t first_storage_;
  ObjectPickle out_;
  PickleWriter pickle_;
};

constexpr absl::string_view kStoragePrefix = "data/";

// The elements of a view, row-major, out of the content of its record.
std::string Gather(const TensorItem& item, absl::string_view record) {
  const int64_t item_size = ItemSize(item.dtype);
  const Dims strides = RowMajorStrides(item.shape);
  int64_t elements = 1;
  for (const int64_t extent : item.shape) elements *= extent;
  std::string out(elements * item_size, '\0');
  for (int64_t i = 0; i < elements; ++i) {
    int64_t from = item.data_at - item.record_at;
    for (size_t d = 0; d < item.shape.size(); ++d) {
      from += i / strides[d] % item.shape[d] * item.strides[d] * item_size;
    }
    std::memcpy(&out[i * item_size], record.data() + from, item_size);
  }
  item.Normalize(
      absl::MakeSpan(reinterpret_cast<std::byte*>(out.data()), out.size()));
  return out;
}

absl::StatusOr<HostTensor> ReadHostTensor(const ZipReader& zip,
                                          PickleValue value,
                                          int64_t max_bytes) {
  DSD_ASSIGN_OR_RETURN(const TensorView view, ReadTensorView(value));
  const ZipReader::Record* const record =
      zip.Find(absl::StrCat(kStoragePrefix, view.storage_key));
  if (record == nullptr) {
    return absl::DataLossError(absl::StrCat("stored object: no record \"data/",
                                            absl::CHexEscape(view.storage_key),
                                            "\""));
  }
  DSD_ASSIGN_OR_RETURN(const int64_t at, zip.ContentOffset(*record));
  DSD_ASSIGN_OR_RETURN(const bool big_endian, IsBigEndian(zip));
  DSD_ASSIGN_OR_RETURN(const TensorItem item,
                       PlaceTensor(view, *record, at, big_endian));
  // Strides of 0 make much of little.
  const auto elements = CheckedProduct(item.shape);
  const auto bytes = elements.has_value()
                         ? CheckedMul(*elements, ItemSize(item.dtype))
                         : std::nullopt;
  if (!bytes.has_value() || *bytes > max_bytes) {
    return absl::ResourceExhaustedError(
        "stored object: a tensor in it is larger than its bytes have room for");
  }
  DSD_ASSIGN_OR_RETURN(const absl::string_view content,
                       zip.Content(*record, kMaxObjectBytes));
  return HostTensor(item.dtype,
                    std::vector<int64_t>(item.shape.begin(), item.shape.end()),
                    Gather(item, content));
}

// A pickle does not begin so.
bool IsArchive(absl::string_view stored) {
  return absl::StartsWith(stored, "PK");
}

std::string Archive(absl::string_view pickle,
                    absl::Span<const HostTensor> storages) {
  std::string out;
  ZipWriter zip(&out);
  zip.AddRecord("data.pkl", pickle);
  zip.AddRecord(".format_version", "1");
  zip.AddRecord(".storage_alignment", "64");
  zip.AddRecord("byteorder", "little");
  for (size_t i = 0; i < storages.size(); ++i) {
    zip.AddRecord(absl::StrCat(kStoragePrefix, i), storages[i].bytes());
  }
  zip.AddRecord("version", "3\n");
  zip.Finish();
  return out;
}

absl::StatusOr<Pickle> ParseObject(absl::string_view bytes) {
  PickleLimits limits;
  limits.allow_persistent_ids = true;
  limits.max_int_bytes = 255;
  return Pickle::Parse(bytes, limits);
}

absl::StatusOr<absl::string_view> PickleIn(const ZipReader& zip) {
  const ZipReader::Record* const record = zip.Find("data.pkl");
  if (record == nullptr) {
    return absl::DataLossError("stored object: no record data.pkl");
  }
  return zip.Content(*record, kMaxObjectBytes);
}

}  // namespace

absl::StatusOr<std::string> ReadStoredObject(FileSlice* slice) {
  if (slice->length() > kMaxObjectBytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("stored object: ", slice->length(),
                     " bytes, the limit is ", kMaxObjectBytes));
  }
  // Small for most, and then one read is cheaper than several.
  DSD_ASSIGN_OR_RETURN(const absl::string_view archive,
                       slice->Fetch(0, slice->length()));
  DSD_ASSIGN_OR_RETURN(const ZipReader zip,
                       ZipReader::Open(slice, kMaxRecords));
  DSD_ASSIGN_OR_RETURN(const absl::string_view pickle, PickleIn(zip));
  for (const ZipReader::Record& record : zip.records()) {
    if (absl::StartsWith(record.name, kStoragePrefix)) {
      return std::string(archive);
    }
  }
  return std::string(pickle);
}

absl::StatusOr<ObjectItem> DecodeStoredObject(absl::string_view stored) {
  if (!IsArchive(stored)) return DecodeObjectPickle(stored);
  MemoryFile file((std::string(stored)));
  DSD_ASSIGN_OR_RETURN(FileSlice slice,
                       FileSlice::Create(&file, 0, file.size_bytes()));
  DSD_ASSIGN_OR_RETURN(const ZipReader zip,
                       ZipReader::Open(&slice, kMaxRecords));
  DSD_ASSIGN_OR_RETURN(const absl::string_view bytes, PickleIn(zip));
  DSD_ASSIGN_OR_RETURN(const Pickle pickle, ParseObject(bytes));
  // What other records there are differs from writer to writer.
  std::string content(bytes);
  for (const ZipReader::Record& record : zip.records()) {
    if (!absl::StartsWith(record.name, kStoragePrefix)) continue;
    DSD_ASSIGN_OR_RETURN(const absl::string_view elements,
                         zip.Content(record, kMaxObjectBytes));
    absl::StrAppend(&content, record.name, ":", elements);
  }
  ObjectBudget budget(file.size_bytes());
  return DecodeObjectValue(
      pickle.root(), content, &budget, [&](PickleValue value) {
        return ReadHostTensor(zip, value, budget.bytes_left);
      });
}

bool IsTorchDType(absl::string_view type_name) {
  return absl::ConsumePrefix(&type_name, kTorchPrefix) &&
         ParseDType(type_name).has_value();
}

absl::StatusOr<ObjectItem> DecodeObjectPickle(absl::string_view bytes) {
  DSD_ASSIGN_OR_RETURN(const Pickle pickle, ParseObject(bytes));
  ObjectBudget budget(static_cast<int64_t>(bytes.size()));
  return DecodeObjectValue(pickle.root(), bytes, &budget);
}

ObjectBudget::ObjectBudget(int64_t pickle_bytes)
    : values_left(
          std::min(pickle_bytes * kMaxValuesPerByte + kFreeValues, kMaxValues)),
      bytes_left(pickle_bytes * kMaxValuesPerByte + kFreeBytes) {}

absl::StatusOr<ObjectItem> DecodeObjectValue(PickleValue value,
                                             absl::string_view bytes,
                                             ObjectBudget* budget,
                                             const ReadTensorFn& read_tensor) {
  ObjectItem item;
  DSD_ASSIGN_OR_RETURN(item.value,
                       ObjectDecoder(budget, read_tensor).Decode(value));
  // By the value where it has a canonical form, else by the bytes.
  const absl::StatusOr<std::string> canonical = EncodeStoredObject(item.value);
  item.digest = ObjectDigest(canonical.ok() ? *canonical : bytes);
  return item;
}

absl::StatusOr<ObjectPickle> EncodeObjectPickle(const Object& value,
                                                int64_t first_storage) {
  return ObjectEncoder(first_storage).Run(value);
}

absl::StatusOr<std::string> EncodeStoredObject(const Object& value) {
  DSD_ASSIGN_OR_RETURN(ObjectPickle object, EncodeObjectPickle(value));
  std::string stored = object.storages.empty()
                           ? std::move(object.pickle)
                           : Archive(object.pickle, object.storages);
  if (static_cast<int64_t>(stored.size()) > kMaxObjectBytes ||
      static_cast<int64_t>(object.storages.size()) > kMaxTensors) {
    return absl::InvalidArgumentError(absl::StrCat(
        "it takes ", stored.size(), " bytes with ", object.storages.size(),
        " tensors in it, expected at most ", kMaxObjectBytes, " and ",
        kMaxTensors, "; tensors in dicts and lists have keys of their own"));
  }
  return stored;
}

std::string ObjectArchive(absl::string_view stored) {
  return IsArchive(stored) ? std::string(stored) : Archive(stored, {});
}

Digest128 ObjectDigest(absl::string_view stored, DigestVersion version) {
  return DigestOfBytes(stored, version);
}

}  // namespace dsd::dcp
