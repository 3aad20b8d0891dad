// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/dcp/tensor_item.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/checked_int.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/dcp/little_endian.h"
#include "dsd/frontends/checkpoint/dcp/pickle_reader.h"
#include "dsd/frontends/checkpoint/dcp/pickle_writer.h"

namespace dsd::dcp {
namespace {

using Kind = PickleValue::Kind;

constexpr int64_t kMaxPickleBytes = 64 << 10;
constexpr int64_t kMaxRecords = 16;
constexpr size_t kMaxDims = 64;
// Read in one go with the directory's neighbourhood.
constexpr int64_t kMaxHeadBytes = 64 << 10;

absl::Status NotATensor(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("stored tensor: ", what));
}

struct StorageRef {
  std::optional<DType> dtype;  // of a typed storage
  std::string key;
  int64_t count = 0;  // elements; bytes if untyped
};

absl::StatusOr<StorageRef> ReadStorage(PickleValue value) {
  StorageRef out;
  if (value.kind() != Kind::kPersistentId) {
    return NotATensor("no storage in its pickle");
  }
  const auto id = value.callee().AsTuple(8);
  if (!id.has_value() || id->size() < 5 || (*id)[0].AsString() != "storage") {
    return NotATensor("its storage has no persistent id");
  }
  const PickleValue type = (*id)[1];
  const auto key = (*id)[2].AsString();
  const auto count = (*id)[4].AsInt();
  if (!key.has_value() || !count.has_value() || *count < 0) {
    return NotATensor("its storage has no key and count");
  }
  out.key = std::string(*key);
  out.count = *count;
  if (type.IsGlobal("torch.storage", "UntypedStorage") ||
      type.IsGlobal("torch", "UntypedStorage")) {
    return out;
  }
  for (int i = 0; i < kNumDTypes; ++i) {
    const DType dtype = static_cast<DType>(i);
    const absl::string_view name = StorageClass(dtype);
    if (!name.empty() && type.IsGlobal("torch", name)) {
      out.dtype = dtype;
      return out;
    }
  }
  return absl::UnimplementedError(
      absl::StrCat("stored tensor: storage class \"",
                   absl::CHexEscape(type.name()), "\" is not supported"));
}

absl::StatusOr<Dims> ReadDims(PickleValue value, absl::string_view what) {
  Dims dims;
  bool good = value.kind() == Kind::kTuple;
  if (value.kind() == Kind::kCall && value.callee().IsGlobal("torch", "Size")) {
    const auto args = value.args().AsTuple(1);
    if (args.has_value() && args->size() == 1)
      return ReadDims((*args)[0], what);
  }
  if (good) {
    value.ForEachItem([&](PickleValue item) {
      const auto number = item.AsInt();
      good = number.has_value() && *number >= 0 && dims.size() < kMaxDims;
      if (good) dims.push_back(*number);
      return good;
    });
  }
  if (!good) {
    return NotATensor(
        absl::StrCat("its ", what, " is no tuple of numbers >= 0"));
  }
  return dims;
}

// The arguments of the call that rebuilds a plain tensor, below what wraps it.
struct Rebuild {
  int version;
  std::vector<PickleValue> args;
};

absl::StatusOr<Rebuild> FindRebuild(PickleValue root) {
  constexpr size_t kMaxArgs = 16;
  constexpr int kMaxWrappers = 4;
  std::string name;
  for (int depth = 0; depth < kMaxWrappers; ++depth) {
    if (root.kind() != Kind::kCall) return NotATensor("its pickle is no call");
    PickleValue function = root.callee();
    auto args = root.args().AsTuple(kMaxArgs);
    if (!args.has_value()) return NotATensor("its pickle has no arguments");
    if ((function.IsGlobal("torch._utils", "_rebuild_parameter") ||
         function.IsGlobal("torch._utils", "_rebuild_parameter_with_state")) &&
        !args->empty()) {
      root = (*args)[0];
      continue;
    }
    if (function.IsGlobal("torch._tensor", "_rebuild_from_type_v2") &&
        args->size() == 4) {
      function = (*args)[0];
      args = (*args)[2].AsTuple(kMaxArgs);
      if (!args.has_value()) return NotATensor("its pickle has no arguments");
    }
    if (function.IsGlobal("torch._utils", "_rebuild_tensor_v2") &&
        args->size() >= 6) {
      return Rebuild{2, *std::move(args)};
    }
    if (function.IsGlobal("torch._utils", "_rebuild_tensor_v3") &&
        args->size() >= 7) {
      return Rebuild{3, *std::move(args)};
    }
    return absl::UnimplementedError(absl::StrCat(
        "stored tensor: it is rebuilt by \"",
        absl::CHexEscape(absl::StrCat(function.module(), ".", function.name())),
        "\", which is not supported"));
  }
  return NotATensor("wrapped too deeply");
}

bool IsComplex(DType dtype) {
  return dtype == DType::kComplex32 || dtype == DType::kComplex64 ||
         dtype == DType::kComplex128;
}

// Bytes of a number whose highest bit is its sign; 0: the dtype has none.
int64_t SignUnitBytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kFloat32:
    case DType::kFloat64:
      return ItemSize(dtype);
    default:
      return IsComplex(dtype) ? ItemSize(dtype) / 2 : 0;
  }
}

std::string TensorPickle(DType dtype, absl::Span<const int64_t> shape) {
  std::string out;
  PickleWriter pickle(2, &out);
  WriteTensor(pickle, dtype, shape, "0");
  pickle.Stop();
  return out;
}

}  // namespace

absl::string_view StorageClass(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "DoubleStorage";
    case DType::kFloat32:
      return "FloatStorage";
    case DType::kFloat16:
      return "HalfStorage";
    case DType::kBFloat16:
      return "BFloat16Storage";
    case DType::kInt64:
      return "LongStorage";
    case DType::kInt32:
      return "IntStorage";
    case DType::kInt16:
      return "ShortStorage";
    case DType::kInt8:
      return "CharStorage";
    case DType::kUInt8:
      return "ByteStorage";
    case DType::kBool:
      return "BoolStorage";
    case DType::kComplex64:
      return "ComplexFloatStorage";
    case DType::kComplex128:
      return "ComplexDoubleStorage";
    default:
      return "";
  }
}

void WriteTensor(PickleWriter& pickle, DType dtype,
                 absl::Span<const int64_t> shape,
                 absl::string_view storage_key) {
  const absl::string_view storage_class = StorageClass(dtype);
  const bool typed = !storage_class.empty();
  int64_t elements = 1;
  for (int64_t extent : shape) elements *= extent;
  const auto numbers = [&](absl::Span<const int64_t> values) {
    if (values.size() > 3) pickle.Mark();
    for (int64_t value : values) pickle.Int(value);
    pickle.Tuple(static_cast<int64_t>(values.size()));
  };
  pickle.Global("torch._utils",
                typed ? "_rebuild_tensor_v2" : "_rebuild_tensor_v3");
  pickle.Mark();
  pickle.Mark();
  pickle.Text("storage");
  if (typed) {
    pickle.Global("torch", storage_class);
  } else {
    pickle.Global("torch.storage", "UntypedStorage");
  }
  pickle.Text(storage_key);
  pickle.Text("cpu");
  pickle.Int(typed ? elements : elements * ItemSize(dtype));
  pickle.Tuple(5);
  pickle.PersistentId();
  pickle.Int(0);  // storage offset
  numbers(shape);
  // As torch has them: an empty dimension counts as one.
  Dims strides(shape.size());
  int64_t stride = 1;
  for (int d = static_cast<int>(shape.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(shape[d], 1);
  }
  numbers(strides);
  pickle.Bool(false);  // requires_grad
  pickle.Global("collections", "OrderedDict");
  pickle.Tuple(0);
  pickle.Reduce();
  if (!typed) pickle.Global("torch", DTypeName(dtype));
  pickle.Tuple(typed ? 6 : 7);
  pickle.Reduce();
}

bool IsTensorCall(PickleValue value) {
  if (value.kind() != Kind::kCall) return false;
  const PickleValue function = value.callee();
  return function.kind() == Kind::kGlobal &&
         (function.module() == "torch._utils" ||
          function.module() == "torch._tensor") &&
         absl::StartsWith(function.name(), "_rebuild");
}

absl::StatusOr<TensorView> ReadTensorView(PickleValue value) {
  DSD_ASSIGN_OR_RETURN(const Rebuild rebuild, FindRebuild(value));
  const std::vector<PickleValue>& args = rebuild.args;
  DSD_ASSIGN_OR_RETURN(const StorageRef storage, ReadStorage(args[0]));
  TensorView view;
  const size_t extra_at = rebuild.version == 2 ? 6 : 7;
  if (rebuild.version == 2) {
    if (!storage.dtype.has_value()) {
      return NotATensor("its storage has no dtype");
    }
    view.dtype = *storage.dtype;
  } else {
    const PickleValue dtype = args[6];
    const auto parsed =
        dtype.module() == "torch" ? ParseDType(dtype.name()) : std::nullopt;
    if (!parsed.has_value()) {
      return absl::UnimplementedError(
          absl::StrCat("stored tensor: dtype \"",
                       absl::CHexEscape(dtype.name()), "\" is not supported"));
    }
    view.dtype = *parsed;
  }
  if (args.size() > extra_at) {
    // {"conj": bool, "neg": bool}: bits that say how to read the values.
    const auto is_set = [&](absl::string_view bit) {
      const auto flag = args[extra_at].Find(bit);
      return flag.has_value() && flag->AsBool() == true;
    };
    view.conjugated = is_set("conj");
    view.negated = is_set("neg");
    if ((view.conjugated && !IsComplex(view.dtype)) ||
        (view.negated && SignUnitBytes(view.dtype) == 0)) {
      return NotATensor(absl::StrCat("its dtype ", DTypeName(view.dtype),
                                     " cannot be conjugated or negated"));
    }
  }
  DSD_ASSIGN_OR_RETURN(view.shape, ReadDims(args[2], "size"));
  DSD_ASSIGN_OR_RETURN(view.strides, ReadDims(args[3], "stride"));
  const auto offset = args[1].AsInt();
  if (view.shape.size() != view.strides.size() || !offset.has_value() ||
      *offset < 0) {
    return NotATensor("its size, stride and offset do not fit together");
  }
  view.offset = *offset;
  const auto storage_bytes = CheckedMul(
      storage.count, storage.dtype.has_value() ? ItemSize(*storage.dtype) : 1);
  if (!storage_bytes.has_value()) return NotATensor("its storage overflows");
  view.storage_bytes = *storage_bytes;
  view.storage_key = storage.key;
  return view;
}

absl::StatusOr<TensorItem> PlaceTensor(const TensorView& view,
                                       const ZipReader::Record& record,
                                       int64_t record_at, bool big_endian) {
  TensorItem item;
  item.dtype = view.dtype;
  item.shape = view.shape;
  item.strides = view.strides;
  if (view.storage_bytes > record.size_bytes) {
    return NotATensor(absl::StrCat("its record has ", record.size_bytes,
                                   " bytes, less than the storage"));
  }
  const int64_t item_size = ItemSize(item.dtype);
  const auto elements = CheckedProduct(item.shape);
  if (!elements.has_value()) return NotATensor("its shape overflows");
  if (*elements > 0) {
    // The last element that the strides reach.
    std::optional<int64_t> last = view.offset;
    for (size_t d = 0; d < item.shape.size() && last.has_value(); ++d) {
      const auto reach = CheckedMul(item.shape[d] - 1, item.strides[d]);
      last = reach.has_value() ? CheckedAdd(*last, *reach) : std::nullopt;
    }
    if (!last.has_value() || *last >= view.storage_bytes / item_size) {
      return NotATensor(absl::StrCat(
          "shape ", DimsToString(item.shape), " and strides ",
          DimsToString(item.strides), " reach outside its storage of ",
          view.storage_bytes, " bytes"));
    }
  }
  item.record_at = record_at;
  item.record_bytes = record.size_bytes;
  item.record_crc = record.crc;
  item.data_at = record_at + (*elements > 0 ? view.offset * item_size : 0);
  item.big_endian = big_endian && item_size > 1;
  item.conjugated = view.conjugated;
  item.negated = view.negated;
  return item;
}

absl::StatusOr<bool> IsBigEndian(const ZipReader& zip) {
  const ZipReader::Record* const order = zip.Find("byteorder");
  if (order == nullptr) return false;
  DSD_ASSIGN_OR_RETURN(const absl::string_view text, zip.Content(*order, 16));
  if (text == "big") return true;
  if (text == "little") return false;
  return NotATensor(absl::StrCat("byte order \"", absl::CHexEscape(text),
                                 "\", expected little or big"));
}

absl::StatusOr<TensorItem> ReadTensorItem(FileSlice* slice) {
  DSD_ASSIGN_OR_RETURN(const ZipReader zip,
                       ZipReader::Open(slice, kMaxRecords));
  const ZipReader::Record* const data_pkl = zip.Find("data.pkl");
  if (data_pkl == nullptr) return NotATensor("no record data.pkl");
  // Everything up to the elements in one read, when they come last.
  int64_t head_end = 0;
  for (const ZipReader::Record& record : zip.records()) {
    if (record.name.rfind("data/", 0) != 0) continue;
    head_end = record.header_at + 30 + 64;
    break;
  }
  if (head_end > 0 && head_end <= kMaxHeadBytes &&
      head_end <= slice->length()) {
    DSD_RETURN_IF_ERROR(slice->Fetch(0, head_end).status());
  }
  DSD_ASSIGN_OR_RETURN(const absl::string_view bytes,
                       zip.Content(*data_pkl, kMaxPickleBytes));
  PickleLimits limits;
  limits.allow_persistent_ids = true;
  DSD_ASSIGN_OR_RETURN(const Pickle pickle, Pickle::Parse(bytes, limits));
  DSD_ASSIGN_OR_RETURN(const TensorView view, ReadTensorView(pickle.root()));
  const ZipReader::Record* const record =
      zip.Find(absl::StrCat("data/", view.storage_key));
  if (record == nullptr) {
    return NotATensor(absl::StrCat("no record \"data/",
                                   absl::CHexEscape(view.storage_key), "\""));
  }
  DSD_ASSIGN_OR_RETURN(const int64_t record_at, zip.ContentOffset(*record));
  DSD_ASSIGN_OR_RETURN(const bool big_endian, IsBigEndian(zip));
  return PlaceTensor(view, *record, record_at, big_endian);
}

void TensorItem::Normalize(absl::Span<std::byte> elements) const {
  const bool is_complex = IsComplex(dtype);
  const size_t unit =
      static_cast<size_t>(ItemSize(dtype)) / (is_complex ? 2 : 1);
  size_t number = 0;
  for (size_t at = 0; at + unit <= elements.size(); at += unit, ++number) {
    const bool imaginary = is_complex && number % 2 == 1;
    if (big_endian) {
      std::reverse(elements.begin() + at, elements.begin() + at + unit);
    }
    if (negated != (conjugated && imaginary)) {
      elements[at + unit - 1] ^= std::byte{0x80};
    }
  }
}

TensorArchive::TensorArchive(DType dtype, absl::Span<const int64_t> shape)
    : pickle_(TensorPickle(dtype, shape)), payload_bytes_(ItemSize(dtype)) {
  for (int64_t extent : shape) payload_bytes_ *= extent;
  ZipWriter zip(&head_);
  WriteHead(&zip);
  tail_ = MakeTail(0);
  const std::string other = MakeTail(~uint32_t{0});
  for (size_t at = 0; at < tail_.size(); ++at) {
    if (tail_[at] == other[at]) continue;
    crc_at_.push_back(at);
    at += sizeof(uint32_t) - 1;
  }
}

void TensorArchive::WriteHead(ZipWriter* zip) const {
  zip->AddRecord("data.pkl", pickle_);
  zip->AddRecord(".format_version", "1");
  zip->AddRecord(".storage_alignment", "64");
  zip->AddRecord("byteorder", "little");
  zip->StartRecord("data/0", payload_bytes_);
}

std::string TensorArchive::Tail(uint32_t crc) const {
  std::string out = tail_;
  for (const size_t at : crc_at_) std::memcpy(&out[at], &crc, sizeof(crc));
  return out;
}

std::string TensorArchive::MakeTail(uint32_t crc) const {
  std::string out;
  ZipWriter zip(&out);
  WriteHead(&zip);
  out.clear();
  zip.FinishRecord(payload_bytes_ == 0 ? 0 : crc);
  zip.AddRecord("version", "3\n");
  zip.Finish();
  return out;
}

std::optional<uint32_t> TensorArchive::CrcOfTail(absl::string_view tail) const {
  if (tail.size() != tail_.size()) return std::nullopt;
  std::optional<uint32_t> crc;
  size_t begin = 0;  // of what is the same in every tail
  const auto is_same_until = [&](size_t end) {
    return tail.substr(begin, end - begin) ==
           absl::string_view(tail_).substr(begin, end - begin);
  };
  for (const size_t at : crc_at_) {
    const uint32_t found = LoadLittleEndian<uint32_t>(tail.data() + at);
    if (!is_same_until(at) || crc.value_or(found) != found) return std::nullopt;
    crc = found;
    begin = at + sizeof(found);
  }
  if (!is_same_until(tail.size())) return std::nullopt;
  return crc.value_or(0);
}

const TensorArchive& TensorArchives::Get(DType dtype, const Dims& shape) {
  constexpr size_t kMaxArchives = 10000;
  if (archives_.size() >= kMaxArchives) archives_.clear();
  std::unique_ptr<TensorArchive>& archive = archives_[{dtype, shape}];
  if (archive == nullptr) {
    archive = std::make_unique<TensorArchive>(dtype, shape);
  }
  return *archive;
}

}  // namespace dsd::dcp
