// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/dcp/object_item.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>
#include <variant>

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
        return Object(Opaque{"int of over 64 bits"});
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
        return Object(Opaque{"set"});
      case Kind::kFrozenSet:
        return Object(Opaque{"frozenset"});
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
    Object::Dict dict;
    absl::Status status;
    bool plain = true;
    value.ForEachEntry([&](PickleValue key, PickleValue item) {
      std::optional<PathSegment> segment;
      if (const auto text = key.AsString()) {
        status = Spend(text->size());
        segment = std::string(*text);
      } else if (const auto number = key.AsInt()) {
        segment = *number;
      }
      plain = segment.has_value();
      if (!plain || !status.ok()) return false;
      absl::StatusOr<Object> decoded = Decode(item, depth + 1);
      status = decoded.status();
      if (!status.ok()) return false;
      dict.Set(*std::move(segment), *std::move(decoded));
      return true;
    });
    DSD_RETURN_IF_ERROR(status);
    // Keys of other types have no form here.
    if (!plain) return Object(Opaque{"dict"});
    return Object(std::move(dict));
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

absl::Status EncodeValue(const Object& value, int depth, PickleWriter& pickle);

constexpr absl::string_view kTorchPrefix = "torch.";

// Not a class, but one of its values, which Python finds by its name.
bool IsTorchDType(absl::string_view name) {
  return absl::ConsumePrefix(&name, kTorchPrefix) &&
         ParseDType(name).has_value();
}

absl::Status EncodeText(absl::string_view text, PickleWriter& pickle) {
  if (!IsUtf8(text) || text.size() > std::numeric_limits<uint32_t>::max()) {
    return absl::InvalidArgumentError(
        absl::StrCat("text \"", absl::CHexEscape(text.substr(0, 64)),
                     "\" is not UTF-8 (or over 4 GiB); use Bytes"));
  }
  pickle.Text(text);
  return absl::OkStatus();
}

absl::Status EncodeItems(const std::vector<Object>& items, int depth,
                         PickleWriter& pickle) {
  for (const Object& item : items) {
    DSD_RETURN_IF_ERROR(EncodeValue(item, depth + 1, pickle));
  }
  return absl::OkStatus();
}

absl::Status EncodeValue(const Object& value, int depth, PickleWriter& pickle) {
  if (depth > kMaxObjectDepth) {
    return absl::InvalidArgumentError(
        absl::StrCat("nested more than ", kMaxObjectDepth, " deep"));
  }
  if (value.is<None>()) {
    pickle.None();
  } else if (const bool* flag = value.get_if<bool>()) {
    pickle.Bool(*flag);
  } else if (const int64_t* number = value.get_if<int64_t>()) {
    pickle.Int(*number);
  } else if (const double* number = value.get_if<double>()) {
    pickle.Float(*number);
  } else if (const std::string* text = value.get_if<std::string>()) {
    DSD_RETURN_IF_ERROR(EncodeText(*text, pickle));
  } else if (const Bytes* bytes = value.get_if<Bytes>()) {
    pickle.Bytes(bytes->data);
  } else if (const auto* list = value.get_if<Object::List>()) {
    pickle.EmptyList();
    if (!list->empty()) {
      pickle.Mark();
      DSD_RETURN_IF_ERROR(EncodeItems(*list, depth, pickle));
      pickle.Appends();
    }
  } else if (const auto* tuple = value.get_if<Object::Tuple>()) {
    if (tuple->items.size() > 3) pickle.Mark();
    DSD_RETURN_IF_ERROR(EncodeItems(tuple->items, depth, pickle));
    pickle.Tuple(static_cast<int64_t>(tuple->items.size()));
  } else if (const auto* dict = value.get_if<Object::Dict>()) {
    pickle.EmptyDict();
    if (!dict->empty()) {
      pickle.Mark();
      for (size_t i = 0; i < dict->size(); ++i) {
        if (const auto* key = std::get_if<std::string>(&dict->key(i))) {
          DSD_RETURN_IF_ERROR(EncodeText(*key, pickle));
        } else {
          pickle.Int(std::get<int64_t>(dict->key(i)));
        }
        DSD_RETURN_IF_ERROR(EncodeValue(dict->value(i), depth + 1, pickle));
      }
      pickle.SetItems();
    }
  } else if (const Opaque* opaque = value.get_if<Opaque>();
             opaque != nullptr && IsTorchDType(opaque->type_name)) {
    pickle.Global("torch", absl::StripPrefix(opaque->type_name, kTorchPrefix));
  } else {
    return absl::InvalidArgumentError(absl::StrCat(
        "a value of class ", value.kind_name(),
        " cannot be written; only "
        "None, bool, int, float, str, bytes, list, tuple, dict and torch's "
        "dtypes can"));
  }
  return absl::OkStatus();
}

}  // namespace

namespace {

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
  // A pickle does not begin with what an archive begins with.
  if (!absl::StartsWith(stored, "PK")) return DecodeObjectPickle(stored);
  MemoryFile file((std::string(stored)));
  DSD_ASSIGN_OR_RETURN(FileSlice slice,
                       FileSlice::Create(&file, 0, file.size_bytes()));
  DSD_ASSIGN_OR_RETURN(const ZipReader zip,
                       ZipReader::Open(&slice, kMaxRecords));
  DSD_ASSIGN_OR_RETURN(const absl::string_view bytes, PickleIn(zip));
  DSD_ASSIGN_OR_RETURN(const Pickle pickle, ParseObject(bytes));
  ObjectBudget budget(file.size_bytes());
  DSD_ASSIGN_OR_RETURN(
      ObjectItem item,
      DecodeObjectValue(pickle.root(), bytes, &budget, [&](PickleValue value) {
        return ReadHostTensor(zip, value, budget.bytes_left);
      }));
  // With the elements; other records have names that differ from writer to
  // writer.
  std::string content(bytes);
  for (const ZipReader::Record& record : zip.records()) {
    if (!absl::StartsWith(record.name, kStoragePrefix)) continue;
    DSD_ASSIGN_OR_RETURN(const absl::string_view elements,
                         zip.Content(record, kMaxObjectBytes));
    absl::StrAppend(&content, record.name, ":", elements);
  }
  item.digest = ObjectDigest(content);
  return item;
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
                                             absl::string_view pickle,
                                             ObjectBudget* budget,
                                             const ReadTensorFn& read_tensor) {
  ObjectItem item;
  DSD_ASSIGN_OR_RETURN(item.value,
                       ObjectDecoder(budget, read_tensor).Decode(value));
  // By the value where it has a canonical form, else by the bytes.
  const absl::StatusOr<std::string> canonical = EncodeObjectPickle(item.value);
  item.digest = ObjectDigest(canonical.ok() ? *canonical : pickle);
  return item;
}

absl::StatusOr<std::string> EncodeObjectPickle(const Object& value) {
  std::string out;
  PickleWriter pickle(2, &out);
  DSD_RETURN_IF_ERROR(EncodeValue(value, 0, pickle));
  pickle.Stop();
  return out;
}

std::string ObjectArchive(absl::string_view pickle) {
  std::string out;
  ZipWriter zip(&out);
  zip.AddRecord("data.pkl", pickle);
  zip.AddRecord(".format_version", "1");
  zip.AddRecord(".storage_alignment", "64");
  zip.AddRecord("byteorder", "little");
  zip.AddRecord("version", "3\n");
  zip.Finish();
  return out;
}

Digest128 ObjectDigest(absl::string_view pickle, DigestVersion version) {
  return DigestOfBytes(pickle, version);
}

}  // namespace dsd::dcp
