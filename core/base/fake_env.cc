// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/fake_env.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {
namespace {

using Kind = FileOperation::Kind;

std::vector<std::string> Parts(const std::string& path) {
  return absl::StrSplit(path, '/', absl::SkipEmpty());
}

// "/a/b" -> "/a" and "b".
std::pair<std::string, std::string> SplitLast(const std::string& path) {
  std::vector<std::string> parts = Parts(path);
  if (parts.empty()) return {"/", ""};
  const std::string last = parts.back();
  parts.pop_back();
  std::string parent;
  for (const std::string& part : parts) absl::StrAppend(&parent, "/", part);
  return {parent.empty() ? "/" : parent, last};
}

absl::Status NotThere(absl::string_view what, const std::string& path) {
  return absl::NotFoundError(
      absl::StrCat(what, " \"", path, "\": no such file or directory"));
}

}  // namespace

std::string ToString(const FileOperation& operation) {
  const char* kind = "?";
  switch (operation.kind) {
    case Kind::kCreate:
      kind = "create";
      break;
    case Kind::kWrite:
      kind = "write";
      break;
    case Kind::kSync:
      kind = "sync";
      break;
    case Kind::kRename:
      kind = "rename";
      break;
    case Kind::kRemove:
      kind = "remove";
      break;
    case Kind::kMkdir:
      kind = "mkdir";
      break;
    case Kind::kSyncDir:
      kind = "syncdir";
      break;
  }
  return absl::StrCat("#", operation.index, " ", kind, " ", operation.path);
}

struct FakeFileSystem::Node {
  bool is_directory = false;

  // A file: its bytes, those of the last Sync, and writes since.
  struct Write {
    int64_t offset;
    std::string data;
  };
  std::string content;
  std::string synced_content;
  std::vector<Write> writes;

  // A directory: its names, those of the last SyncDir, and changes since.
  std::map<std::string, NodePtr> names;
  std::map<std::string, NodePtr> synced_names;
  std::vector<NameChange> changes;

  static void Apply(std::string& content, const Write& write, size_t length) {
    if (content.size() < write.offset + length) {
      content.resize(write.offset + length);
    }
    content.replace(write.offset, length, write.data, 0, length);
  }
};

class FakeFileSystem::Readable final : public ReadableFile {
 public:
  Readable(FakeFileSystem* files, NodePtr node, std::string path, int64_t size)
      : files_(*files),
        node_(std::move(node)),
        path_(std::move(path)),
        size_(size) {}

  int64_t size_bytes() const override { return size_; }

  absl::Status ReadAt(int64_t offset, absl::Span<std::byte> out) override {
    absl::MutexLock lock(&files_.mu_);
    const std::string& content = node_->content;
    if (offset < 0 || offset + out.size() > content.size()) {
      return absl::OutOfRangeError(absl::StrCat(
          "read \"", path_, "\": bytes [", offset, ", +", out.size(),
          ") of a file of ", content.size(), " bytes"));
    }
    std::memcpy(out.data(), content.data() + offset, out.size());
    return absl::OkStatus();
  }

 private:
  FakeFileSystem& files_;
  const NodePtr node_;
  const std::string path_;
  const int64_t size_;
};

class FakeFileSystem::Writable final : public WritableFile {
 public:
  Writable(FakeFileSystem* files, NodePtr node, std::string path)
      : files_(*files), node_(std::move(node)), path_(std::move(path)) {}

  absl::Status WriteAt(int64_t offset,
                       absl::Span<const std::byte> data) override {
    absl::MutexLock lock(&files_.mu_);
    Node::Write write{
        offset,
        std::string(reinterpret_cast<const char*>(data.data()), data.size())};
    const bool was_down = files_.crashed_;
    absl::Status status = files_.Begin(Kind::kWrite, path_);
    if (status.ok()) {
      status = CheckRoom("write", offset + static_cast<int64_t>(data.size()));
    }
    if (!status.ok()) {
      if (was_down) return status;
      write.data.resize(files_.torn_writes_() % (write.data.size() + 1));
    }
    Node::Apply(node_->content, write, write.data.size());
    node_->writes.push_back(std::move(write));
    return status;
  }

  absl::Status Reserve(int64_t bytes) override {
    absl::MutexLock lock(&files_.mu_);
    return CheckRoom("allocate", bytes);
  }

  absl::Status Sync() override {
    absl::MutexLock lock(&files_.mu_);
    DSD_RETURN_IF_ERROR(files_.Begin(Kind::kSync, path_));
    node_->synced_content = node_->content;
    node_->writes.clear();
    return absl::OkStatus();
  }

  absl::Status Close() override { return absl::OkStatus(); }

 private:
  // For the file to have `bytes`.
  absl::Status CheckRoom(absl::string_view what, int64_t bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(files_.mu_) {
    const int64_t growth = std::max<int64_t>(
        0, bytes - static_cast<int64_t>(node_->content.size()));
    if (files_.capacity_bytes_ < 0 ||
        files_.BytesIn(*files_.root_) + growth <= files_.capacity_bytes_) {
      return absl::OkStatus();
    }
    return absl::ResourceExhaustedError(
        absl::StrCat(what, " \"", path_, "\": no space left on device"));
  }

  FakeFileSystem& files_;
  const NodePtr node_;
  const std::string path_;
};

FakeFileSystem::FakeFileSystem() : root_(std::make_shared<Node>()) {
  absl::MutexLock lock(&mu_);
  root_->is_directory = true;
}
FakeFileSystem::~FakeFileSystem() = default;

void FakeFileSystem::SetFault(
    std::function<absl::Status(const FileOperation&)> fault) {
  absl::MutexLock lock(&mu_);
  fault_ = std::move(fault);
}

void FakeFileSystem::SetCapacity(int64_t bytes) {
  absl::MutexLock lock(&mu_);
  capacity_bytes_ = bytes;
}

void FakeFileSystem::CrashAt(int64_t index) {
  absl::MutexLock lock(&mu_);
  crash_at_ = index;
  crashed_ |= index <= num_operations_;
}

void FakeFileSystem::Recover(uint64_t seed) {
  absl::MutexLock lock(&mu_);
  std::mt19937_64 random(seed);
  RecoverNode(*root_, random);
  crash_at_ = std::numeric_limits<int64_t>::max();
  crashed_ = false;
}

void FakeFileSystem::RecoverNode(Node& node, std::mt19937_64& random) {
  if (!node.is_directory) {
    // A file that two names share is recovered once: nothing is left to lose.
    std::string content = node.synced_content;
    for (const Node::Write& write : node.writes) {
      switch (random() % 3) {
        case 0:
          Node::Apply(content, write, write.data.size());
          break;
        case 1:
          Node::Apply(content, write, random() % (write.data.size() + 1));
          break;
        default:
          break;
      }
    }
    node.content = node.synced_content = content;
    node.writes.clear();
    return;
  }
  for (const NameChange& change : node.changes) {
    if (random() % 2 == 0) continue;
    for (const auto& [name, target] : change.names) {
      if (target == nullptr) {
        node.synced_names.erase(name);
      } else {
        node.synced_names[name] = target;
      }
    }
  }
  node.changes.clear();
  node.names = node.synced_names;
  for (auto& [name, child] : node.names) RecoverNode(*child, random);
}

int64_t FakeFileSystem::num_operations() const {
  absl::MutexLock lock(&mu_);
  return num_operations_;
}

int64_t FakeFileSystem::BytesIn(const Node& node) const {
  int64_t bytes = static_cast<int64_t>(node.content.size());
  for (const auto& [name, child] : node.names) bytes += BytesIn(*child);
  return bytes;
}

absl::Status FakeFileSystem::Begin(Kind kind, const std::string& path) {
  const FileOperation operation{kind, path, num_operations_++};
  crashed_ |= operation.index >= crash_at_;
  if (fault_ != nullptr && !crashed_) {
    const absl::Status status = fault_(operation);
    if (!status.ok()) {
      return Annotate(status, ToString(operation));
    }
  }
  if (crashed_) {
    return absl::UnavailableError(
        absl::StrCat(ToString(operation), ": the machine is down"));
  }
  return absl::OkStatus();
}

absl::StatusOr<FakeFileSystem::NodePtr> FakeFileSystem::Find(
    const std::string& path) {
  NodePtr node = root_;
  for (const std::string& part : Parts(path)) {
    if (!node->is_directory) {
      return absl::FailedPreconditionError(
          absl::StrCat("open \"", path, "\": not a directory"));
    }
    const auto it = node->names.find(part);
    if (it == node->names.end()) return NotThere("open", path);
    node = it->second;
  }
  return node;
}

absl::StatusOr<FakeFileSystem::NodePtr> FakeFileSystem::FindDir(
    const std::string& path) {
  DSD_ASSIGN_OR_RETURN(NodePtr node, Find(path));
  if (!node->is_directory) {
    return absl::FailedPreconditionError(
        absl::StrCat("\"", path, "\": not a directory"));
  }
  return node;
}

void FakeFileSystem::Change(Node& directory, NameChange change) {
  for (const auto& [name, target] : change.names) {
    if (target == nullptr) {
      directory.names.erase(name);
    } else {
      directory.names[name] = target;
    }
  }
  directory.changes.push_back(std::move(change));
}

absl::StatusOr<std::string> FakeFileSystem::Content(const std::string& path) {
  absl::MutexLock lock(&mu_);
  DSD_ASSIGN_OR_RETURN(const NodePtr node, Find(path));
  return node->content;
}

void FakeFileSystem::SetContent(const std::string& path, std::string content) {
  absl::MutexLock lock(&mu_);
  const absl::StatusOr<NodePtr> found = Find(path);
  NodePtr node;
  if (found.ok()) {
    node = *found;
  } else {
    const auto [parent, name] = SplitLast(path);
    node = std::make_shared<Node>();
    const absl::StatusOr<NodePtr> directory = FindDir(parent);
    if (!directory.ok()) return;
    (*directory)->names[name] = node;
    (*directory)->synced_names[name] = node;
  }
  node->content = node->synced_content = std::move(content);
  node->writes.clear();
}

absl::StatusOr<std::unique_ptr<ReadableFile>> FakeFileSystem::OpenReadable(
    const std::string& path) {
  absl::MutexLock lock(&mu_);
  if (crashed_) return absl::UnavailableError("the machine is down");
  DSD_ASSIGN_OR_RETURN(const NodePtr node, Find(path));
  if (node->is_directory) {
    return absl::FailedPreconditionError(
        absl::StrCat("open \"", path, "\": not a regular file"));
  }
  return std::make_unique<Readable>(this, node, path,
                                    static_cast<int64_t>(node->content.size()));
}

absl::StatusOr<std::unique_ptr<WritableFile>> FakeFileSystem::CreateWritable(
    const std::string& path) {
  absl::MutexLock lock(&mu_);
  DSD_RETURN_IF_ERROR(Begin(Kind::kCreate, path));
  const auto [parent, name] = SplitLast(path);
  DSD_ASSIGN_OR_RETURN(const NodePtr directory, FindDir(parent));
  if (directory->names.count(name) > 0) {
    return absl::AlreadyExistsError(
        absl::StrCat("create \"", path, "\": file exists"));
  }
  NodePtr node = std::make_shared<Node>();
  Change(*directory, {{{name, node}}});
  return std::make_unique<Writable>(this, node, path);
}

absl::Status FakeFileSystem::Rename(const std::string& from,
                                    const std::string& to) {
  absl::MutexLock lock(&mu_);
  DSD_RETURN_IF_ERROR(Begin(Kind::kRename, to));
  const auto [from_parent, from_name] = SplitLast(from);
  const auto [to_parent, to_name] = SplitLast(to);
  DSD_ASSIGN_OR_RETURN(const NodePtr from_directory, FindDir(from_parent));
  DSD_ASSIGN_OR_RETURN(const NodePtr to_directory, FindDir(to_parent));
  const auto it = from_directory->names.find(from_name);
  if (it == from_directory->names.end()) return NotThere("rename", from);
  const NodePtr node = it->second;
  if (from_directory == to_directory) {
    Change(*to_directory, {{{to_name, node}, {from_name, nullptr}}});
  } else {
    Change(*to_directory, {{{to_name, node}}});
    Change(*from_directory, {{{from_name, nullptr}}});
  }
  return absl::OkStatus();
}

absl::Status FakeFileSystem::Remove(const std::string& path) {
  absl::MutexLock lock(&mu_);
  DSD_RETURN_IF_ERROR(Begin(Kind::kRemove, path));
  const auto [parent, name] = SplitLast(path);
  DSD_ASSIGN_OR_RETURN(const NodePtr directory, FindDir(parent));
  const auto it = directory->names.find(name);
  if (it == directory->names.end()) return NotThere("remove", path);
  if (it->second->is_directory && !it->second->names.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("remove \"", path, "\": directory not empty"));
  }
  Change(*directory, {{{name, nullptr}}});
  return absl::OkStatus();
}

absl::Status FakeFileSystem::CreateDirs(const std::string& path) {
  absl::MutexLock lock(&mu_);
  DSD_RETURN_IF_ERROR(Begin(Kind::kMkdir, path));
  NodePtr node = root_;
  for (const std::string& part : Parts(path)) {
    const auto it = node->names.find(part);
    if (it != node->names.end()) {
      if (!it->second->is_directory) {
        return absl::FailedPreconditionError(absl::StrCat(
            "create directory \"", path, "\": \"", part, "\" is a file"));
      }
      node = it->second;
      continue;
    }
    NodePtr child = std::make_shared<Node>();
    child->is_directory = true;
    Change(*node, {{{part, child}}});
    node = child;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> FakeFileSystem::List(
    const std::string& path) {
  absl::MutexLock lock(&mu_);
  if (crashed_) return absl::UnavailableError("the machine is down");
  DSD_ASSIGN_OR_RETURN(const NodePtr node, FindDir(path));
  std::vector<std::string> names;
  for (const auto& [name, child] : node->names) names.push_back(name);
  return names;
}

absl::StatusOr<FileInfo> FakeFileSystem::Stat(const std::string& path) {
  absl::MutexLock lock(&mu_);
  if (crashed_) return absl::UnavailableError("the machine is down");
  DSD_ASSIGN_OR_RETURN(const NodePtr node, Find(path));
  FileInfo info;
  info.kind = node->is_directory ? FileKind::kDirectory : FileKind::kRegular;
  info.size_bytes = static_cast<int64_t>(node->content.size());
  return info;
}

absl::Status FakeFileSystem::SyncDir(const std::string& path) {
  absl::MutexLock lock(&mu_);
  DSD_RETURN_IF_ERROR(Begin(Kind::kSyncDir, path));
  DSD_ASSIGN_OR_RETURN(const NodePtr node, FindDir(path));
  node->synced_names = node->names;
  node->changes.clear();
  return absl::OkStatus();
}

FakeEnv::FakeEnv(uint64_t seed)
    : now_(absl::UnixEpoch() + absl::Hours(1)), random_(seed) {}

void FakeEnv::Advance(absl::Duration duration) {
  absl::MutexLock lock(&mu_);
  now_ += duration;
}

absl::Time FakeEnv::Now() {
  absl::MutexLock lock(&mu_);
  return now_;
}

absl::Time FakeEnv::WallTime() { return Now() + absl::Hours(24 * 365 * 50); }

bool FakeEnv::Await(absl::Mutex& mu, const absl::Condition& condition,
                    absl::Time deadline) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  // The real clock only paces the looking.
  Env* const real = Env::Real();
  while (true) {
    if (real->Await(mu, condition, real->Now() + absl::Milliseconds(1))) {
      return true;
    }
    if (Now() >= deadline) return condition.Eval();
  }
}

void FakeEnv::SleepUntil(absl::Time time) {
  absl::MutexLock lock(&mu_);
  now_ = std::max(now_, time);
}

absl::StatusOr<int> FakeEnv::Poll(absl::Span<struct pollfd> fds,
                                  absl::Time deadline) {
  Env* const real = Env::Real();
  while (true) {
    DSD_ASSIGN_OR_RETURN(const int ready,
                         real->Poll(fds, real->Now() + absl::Milliseconds(1)));
    if (ready > 0 || Now() >= deadline) return ready;
  }
}

std::unique_ptr<EnvThread> FakeEnv::StartThread(
    absl::string_view name, absl::AnyInvocable<void()> body) {
  return Env::Real()->StartThread(name, std::move(body));
}

uint64_t FakeEnv::RandomSeed() {
  absl::MutexLock lock(&mu_);
  return random_();
}

}  // namespace dsd
