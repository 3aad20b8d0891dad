// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/torch_archive/archive_writer.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <variant>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/value/flatten.h"
#include "dsd/core/value/tree.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/dcp/pickle_writer.h"
#include "dsd/frontends/checkpoint/dcp/tensor_item.h"

namespace dsd::torch_archive {
namespace {

constexpr int64_t kMaxListIndex = 1'000'000;
// The protocol's opcode and version, and STOP.
constexpr size_t kPickleHeadBytes = 2;
constexpr size_t kPickleTailBytes = 1;

std::string Quoted(const Path& path) {
  return absl::StrCat("\"", absl::CHexEscape(JoinPath(path)), "\"");
}

// A dict, a list or a leaf.
struct Node {
  std::vector<std::pair<PathSegment, Node>> children;
  absl::flat_hash_map<PathSegment, size_t> index;  // of children
  int64_t tensor = -1;
  const std::string* pickle = nullptr;  // of an object
  bool has_number_keys = false;
  bool is_tuple = false;  // if it is a list

  bool is_leaf() const { return tensor >= 0 || pickle != nullptr; }
  bool is_list() const {
    return !children.empty() &&
           std::holds_alternative<int64_t>(children[0].first);
  }
};

class TreeWriter {
 public:
  explicit TreeWriter(absl::Span<const NewTensor> tensors)
      : tensors_(tensors), pickle_(2, &out_) {
    for (const NewTensor& tensor : tensors) {
      storages_.push_back(tensor.same_as < 0 ? num_storages_++
                                             : storages_[tensor.same_as]);
    }
  }

  int64_t num_storages() const { return num_storages_; }

  absl::Status Add(const Path& path, int64_t tensor,
                   const std::string* pickle) {
    if (path.empty() || path.size() > dcp::kMaxObjectDepth) {
      return absl::InvalidArgumentError(
          absl::StrCat("key ", Quoted(path), ": a path of ", path.size(),
                       " parts, expected 1 to ", dcp::kMaxObjectDepth));
    }
    Node* node = &root_;
    for (const PathSegment& segment : path) {
      if (node->is_leaf()) {
        return absl::InvalidArgumentError(absl::StrCat(
            "key ", Quoted(path), " lies inside another, which is no dict"));
      }
      const bool is_number = std::holds_alternative<int64_t>(segment);
      if (!node->children.empty() && node->is_list() != is_number) {
        return absl::InvalidArgumentError(
            absl::StrCat("key ", Quoted(path),
                         ": a list and a dict in one place of the nesting"));
      }
      if (is_number && (std::get<int64_t>(segment) < 0 ||
                        std::get<int64_t>(segment) > kMaxListIndex)) {
        return absl::InvalidArgumentError(absl::StrCat(
            "key ", Quoted(path), ": index ", std::get<int64_t>(segment),
            ", expected 0 to ", kMaxListIndex));
      }
      const auto [it, is_new] =
          node->index.try_emplace(segment, node->children.size());
      if (is_new) node->children.emplace_back(segment, Node());
      node = &node->children[it->second].second;
    }
    if (node->is_leaf() || !node->children.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "key ", Quoted(path), " is there twice, or others lie inside it"));
    }
    node->tensor = tensor;
    node->pickle = pickle;
    return absl::OkStatus();
  }

  // Null if there is no dict or list.
  Node* Find(const Path& path) {
    Node* node = &root_;
    for (const PathSegment& segment : path) {
      const auto found = node->index.find(segment);
      if (found == node->index.end()) return nullptr;
      node = &node->children[found->second].second;
    }
    return node->is_leaf() ? nullptr : node;
  }

  absl::StatusOr<std::string> Write() {
    DSD_RETURN_IF_ERROR(Write(root_));
    pickle_.Stop();
    return std::move(out_);
  }

 private:
  absl::Status Write(Node& node) {
    if (node.tensor >= 0) {
      const NewTensor& tensor = tensors_[node.tensor];
      dcp::WriteTensor(pickle_, tensor.dtype, tensor.shape,
                       absl::StrCat(storages_[node.tensor]));
      return absl::OkStatus();
    }
    if (node.pickle != nullptr) {
      out_.append(*node.pickle, kPickleHeadBytes,
                  node.pickle->size() - kPickleHeadBytes - kPickleTailBytes);
      return absl::OkStatus();
    }
    if (node.is_list()) {
      std::sort(node.children.begin(), node.children.end(),
                [](const auto& a, const auto& b) { return a.first < b.first; });
      const int64_t count = std::get<int64_t>(node.children.back().first) + 1;
      if (!node.is_tuple) pickle_.EmptyList();
      if (!node.is_tuple || count > 3) pickle_.Mark();
      int64_t next = 0;
      for (auto& [segment, child] : node.children) {
        for (; next < std::get<int64_t>(segment); ++next) pickle_.None();
        DSD_RETURN_IF_ERROR(Write(child));
        ++next;
      }
      if (node.is_tuple) {
        pickle_.Tuple(count);
      } else {
        pickle_.Appends();
      }
      return absl::OkStatus();
    }
    pickle_.EmptyDict();
    if (node.children.empty()) return absl::OkStatus();
    pickle_.Mark();
    for (auto& [segment, child] : node.children) {
      const std::string& key = std::get<std::string>(segment);
      if (!dcp::IsUtf8(key)) {
        return absl::InvalidArgumentError(absl::StrCat(
            "key \"", absl::CHexEscape(key), "\" is not valid UTF-8"));
      }
      const auto number =
          node.has_number_keys ? ToNumberKey(key) : std::nullopt;
      if (number.has_value()) {
        pickle_.Int(*number);
      } else {
        pickle_.Text(key);
      }
      DSD_RETURN_IF_ERROR(Write(child));
    }
    pickle_.SetItems();
    return absl::OkStatus();
  }

  const absl::Span<const NewTensor> tensors_;
  std::vector<int64_t> storages_;  // by tensor
  int64_t num_storages_ = 0;
  std::string out_;
  dcp::PickleWriter pickle_;
  Node root_;
};

}  // namespace

absl::StatusOr<Tree> EncodeTree(absl::Span<const NewTensor> tensors,
                                absl::Span<const NewObject> objects,
                                const Nesting& nesting) {
  Tree out;
  TreeWriter tree(tensors);
  for (size_t i = 0; i < tensors.size(); ++i) {
    DSD_RETURN_IF_ERROR(
        tree.Add(tensors[i].path, static_cast<int64_t>(i), nullptr));
  }
  std::vector<std::string> pickles;
  pickles.reserve(objects.size());
  for (const NewObject& object : objects) {
    absl::StatusOr<dcp::ObjectPickle> encoded = dcp::EncodeObjectPickle(
        object.value,
        tree.num_storages() + static_cast<int64_t>(out.inner.size()));
    DSD_RETURN_IF_ERROR(encoded.status()) << "object " << Quoted(object.path);
    pickles.push_back(std::move(encoded->pickle));
    DSD_RETURN_IF_ERROR(tree.Add(object.path, -1, &pickles.back()));
    // In the same order as the storages.
    VisitTree<HostTensor>(
        object.value, [&](const TreePath& path, const Object& value) {
          if (value.is<Object::Map>()) {
            const auto map = dcp::EncodeObjectPickle(value, 0);
            for (const HostTensor& tensor : map->storages) {
              out.inner.emplace_back(std::nullopt, tensor);
            }
          }
          const auto* tensor = value.get_if<HostTensor>();
          if (tensor == nullptr) return;
          out.inner.emplace_back(
              absl::StrCat(JoinPath(object.path), path.empty() ? "" : ".",
                           TreePathText(path)),
              *tensor);
        });
  }
  DSD_ASSIGN_OR_RETURN(const dcp::ObjectPickle empty,
                       dcp::EncodeObjectPickle(Object(Object::Dict()), 0));
  for (const Path& path : nesting.empty) {
    // Elsewhere there is something in it.
    tree.Add(path, -1, &empty.pickle).IgnoreError();
  }
  for (const Path& path : nesting.number_keyed) {
    if (Node* const node = tree.Find(path)) node->has_number_keys = true;
  }
  for (const Path& path : nesting.tuples) {
    if (Node* const node = tree.Find(path)) node->is_tuple = true;
  }
  DSD_ASSIGN_OR_RETURN(out.pickle, tree.Write());
  return out;
}

ArchiveWriter::ArchiveWriter(std::string pickle) : zip_(&out_) {
  zip_.AddRecord("data.pkl", pickle);
  zip_.AddRecord(".format_version", "1");
  zip_.AddRecord(".storage_alignment", "64");
  zip_.AddRecord("byteorder", "little");
}

std::string ArchiveWriter::Take() { return std::exchange(out_, std::string()); }

std::string ArchiveWriter::StartTensor(int64_t bytes) {
  zip_.StartRecord(absl::StrCat("data/", next_++), bytes);
  return Take();
}

std::string ArchiveWriter::FinishTensor(uint32_t crc) {
  zip_.FinishRecord(crc);
  return Take();
}

std::string ArchiveWriter::Finish(absl::string_view digests) {
  zip_.AddRecord(kDigestsRecord, digests);
  zip_.AddRecord("version", "3\n");
  zip_.Finish();
  return Take();
}

}  // namespace dsd::torch_archive
