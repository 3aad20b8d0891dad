// SPDX-License-Identifier: Apache-2.0
//
// Saving and loading beside PyTorch in the same run, and beside what the disk
// and the memory reach at most. Fails if anything comes out wrong.

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "dsd/core/base/aligned_buffer.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/dcp/metadata.h"
#include "dsd/testing/benchmarks/measure.h"
#include "dsd/testing/harness/rank_processes.h"
#include "nlohmann/json.hpp"

namespace dsd {
namespace {

using Json = nlohmann::json;

bool same = true;  // whether all that came out is right

std::string peer_command;  // NOLINT: set once, by main
std::string root;          // NOLINT

// The run of the peer with the least wall time.
Json LeastOfPeer(const std::string& words, int runs = 1) {
  Json best;
  for (int i = 0; i < runs; ++i) {
    Json now = RunPeer(absl::StrCat(peer_command, " ", words));
    if (i == 0 || now.value("wall", 0.0) < best.value("wall", 0.0)) best = now;
  }
  return best;
}

Seconds ToSeconds(const Json& json) { return {json["wall"], json["cpu"]}; }

void Row(const std::string& what, const Seconds& theirs, const Seconds& ours) {
  absl::PrintF(
      "%s: PyTorch %.4f s (CPU %.4f), dsd %.4f s (CPU %.4f), ratio %.1fx\n",
      what, theirs.wall, theirs.cpu, ours.wall, ours.cpu,
      theirs.wall / ours.wall);
  std::fflush(stdout);
}

void Verdict(const std::string& what, bool right) {
  same &= right;
  if (!right) absl::PrintF("    %s: NOT RIGHT\n", what);
}

std::string Fresh(const std::string& name) {
  const std::string path = absl::StrCat(root, "/", name);
  std::filesystem::remove_all(path);
  return path;
}

// Tensor `tensor` is its index plus tensor, in float32.
struct Tensors {
  MemoryEndpoint endpoint;
  std::vector<AlignedBuffer> buffers;
  checkpoint::State state;

  Tensors(int tensors, const Layout& layout, Holder holder, bool filled) {
    int64_t elements = 1;
    const Dims shape = *layout.LocalShape(holder);
    for (const int64_t extent : shape) elements *= extent;
    int64_t first = 0;
    for (const LocalBox& box : layout.BoxesOf(holder)) {
      first = FlatIndex(layout.shape(), box.box.lo);
      break;
    }
    for (int t = 0; t < tensors; ++t) {
      buffers.emplace_back(elements * 4);
      float* const data = reinterpret_cast<float*>(buffers.back().data());
      for (int64_t i = 0; i < elements; ++i) {
        data[i] = filled ? ValueOf(t, first + i) : 0;
      }
      Must(endpoint.AddLocal({absl::StrCat("t", t), DType::kFloat32, layout},
                             holder, buffers.back().data()));
    }
    state.tensors = &endpoint;
    first_ = first;
    elements_ = elements;
  }

  static float ValueOf(int tensor, int64_t index) {
    return static_cast<float>(index) + static_cast<float>(tensor);
  }

  bool IsRight() const {
    for (size_t t = 0; t < buffers.size(); ++t) {
      const float* const data =
          reinterpret_cast<const float*>(buffers[t].data());
      for (int64_t i = 0; i < elements_; ++i) {
        if (data[i] != ValueOf(static_cast<int>(t), first_ + i)) return false;
      }
    }
    return true;
  }

 private:
  int64_t first_ = 0;
  int64_t elements_ = 0;
};

// Row 9.
void BigIndex(int tensors, int chunks) {
  dcp::Metadata index;
  index.save_id = "id";
  for (int c = 0; c < chunks; ++c) {
    index.files.push_back(absl::StrCat("__", c, "_0.distcp"));
  }
  for (int t = 0; t < tensors; ++t) {
    const std::string key = absl::StrCat("model.layers.", t, ".weight");
    index.AddTensor(key, {std::string("model"), key.substr(6)},
                    DType::kBFloat16, {16 * chunks, 1024});
    for (int c = 0; c < chunks; ++c) {
      index.AddChunk({{16 * c, 0}, {16 * c + 16, 1024}},
                     {static_cast<uint32_t>(c), int64_t{t} * 40000, 34000});
    }
  }
  const std::string path = Fresh("index");
  Must(Env::Real()->files().CreateDirs(path));
  const std::string file = absl::StrCat(path, "/dsd");
  int64_t bytes = 0;
  const Seconds write = LeastOf(
      3, [] {},
      [&] {
        FILE* const out = std::fopen(file.c_str(), "wb");
        bytes = 0;
        Must(dcp::EncodeMetadata(index, [&](absl::string_view piece) {
          bytes += static_cast<int64_t>(piece.size());
          return std::fwrite(piece.data(), 1, piece.size(), out) == piece.size()
                     ? absl::OkStatus()
                     : absl::UnavailableError("write");
        }));
        std::fclose(out);
      });
  const auto read_file = [](const std::string& from) {
    const auto opened = Must(Env::Real()->files().OpenReadable(from));
    return Must(dcp::DecodeMetadata(
        opened->size_bytes(), [&](int64_t offset, absl::Span<std::byte> out) {
          return opened->ReadAt(offset, out);
        }));
  };
  double grown = 0;
  dcp::Metadata back;
  const Seconds read = LeastOf(
      3, [&] { back = dcp::Metadata(); },
      [&] {
        const double before = MemoryMiB();
        back = read_file(file);
        grown = std::max(grown, MemoryMiB() - before);
      });
  const Json peer =
      LeastOfPeer(absl::StrCat("metadata ", path, " ", tensors, " ", chunks));
  const Seconds read_theirs = LeastOf(
      3, [] {}, [&] { read_file(path + "/torch"); });
  absl::PrintF("9. index of %d chunks: PyTorch's has %.1f MB, dsd's %.1f MB\n",
               tensors * chunks, peer["bytes"].get<double>() / 1e6,
               static_cast<double>(bytes) / 1e6);
  Row("   write", ToSeconds(peer["write"]), write);
  Row("   read, each its own", ToSeconds(peer["read_torch"]), read);
  Row("   read, dsd PyTorch's and PyTorch dsd's", ToSeconds(peer["read_dsd"]),
      read_theirs);
  absl::PrintF("   memory after reading: PyTorch %.0f MiB, dsd %.0f MiB\n",
               peer["read_torch_mib"].get<double>(), grown);
  Verdict("index", back.bounds == index.bounds &&
                       peer["chunks_dsd"] == tensors * chunks &&
                       peer["stored_dsd"] == tensors * chunks);
}

// What the disk reaches at most, past the page cache.
double DirectWriteSeconds(int64_t bytes) {
  constexpr int64_t kPiece = int64_t{8} << 20;
  AlignedBuffer buffer(kPiece);
  std::memset(buffer.data(), 1, kPiece);
  return LeastOf(
             3, [] {},
             [&] {
               const std::string path = Fresh("raw");
               const int fd = open(
                   path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_DIRECT, 0600);
               for (int64_t at = 0; at < bytes; at += kPiece) {
                 if (pwrite(fd, buffer.data(), kPiece, at) != kPiece) {
                   std::cerr << "no direct writes here" << std::endl;
                   std::exit(1);
                 }
               }
               fsync(fd);
               close(fd);
             })
      .wall;
}

Seconds Memcpy(int64_t bytes) {
  AlignedBuffer from(bytes), to(bytes);
  std::memset(from.data(), 1, bytes);
  std::memset(to.data(), 2, bytes);
  return LeastOf(
      5, [] {}, [&] { std::memcpy(to.data(), from.data(), bytes); });
}

// Rows 10, 11 and 13.
void SaveAndLoad(const std::string& what, int tensors, int64_t elements,
                 int runs) {
  const int64_t bytes = 4 * elements * tensors;
  const Layout layout = Layout::Replicated({elements}, {0});
  const std::string ours = absl::StrCat(root, "/dsd");
  const std::string words = absl::StrCat(tensors, " ", elements);
  std::string theirs;
  Seconds peer;
  for (int i = 0; i < std::min(runs, 2); ++i) {
    theirs = Fresh("torch");
    const Seconds now =
        ToSeconds(LeastOfPeer(absl::StrCat("save ", theirs, " ", words)));
    if (i == 0 || now.wall < peer.wall) peer = now;
  }
  Tensors source(tensors, layout, 0, true);
  const Seconds save = LeastOf(
      runs, [] { Fresh("dsd"); },
      [&] { Must(checkpoint::Save(ours, source.state)); });
  Row(absl::StrCat("10. durable save of ", what), peer, save);
  const auto gigabytes = [&](double seconds) {
    return static_cast<double>(bytes) / seconds / 1e9;
  };
  if (bytes >= 1 << 26) {
    const double direct = DirectWriteSeconds(bytes);
    absl::PrintF(
        "    %.2f GB/s; the disk past the page cache %.2f GB/s: %.2f "
        "of it\n",
        gigabytes(save.wall), gigabytes(direct), direct / save.wall);
  }

  Tensors target(tensors, layout, 0, false);
  const auto load = [&](bool verify) {
    checkpoint::LoadOptions options;
    options.verify = verify;
    return LeastOf(
        runs, [] {},
        [&] { Must(checkpoint::Load(ours, target.state, nullptr, options)); });
  };
  load(true);  // The files come into the page cache.
  const Seconds unverified = load(false);
  const Seconds verified = load(true);
  Verdict("load", target.IsRight());
  const Json peer_load =
      LeastOfPeer(absl::StrCat("load ", ours, " ", words), std::min(runs, 2));
  Verdict("PyTorch's load", peer_load["right"]);
  Row(absl::StrCat("11. load of ", what, ", warm cache, verified"),
      ToSeconds(peer_load), verified);
  if (bytes >= 1 << 26) {
    const double copy = Memcpy(bytes).wall;
    absl::PrintF(
        "    %.2f GB/s, unverified %.2f GB/s; memcpy %.2f GB/s: %.2f of it\n",
        gigabytes(verified.wall), gigabytes(unverified.wall), gigabytes(copy),
        copy / verified.wall);
    const auto saver = Must(checkpoint::Saver::Create());
    Must(saver->Start(ours, source.state));
    const Seconds blocked = LeastOf(
        std::min(runs, 3), [&] { Must(saver->Wait()); },
        [&] { Must(saver->Start(ours, source.state)); });
    Must(saver->Wait());
    absl::PrintF(
        "13. save in the background: the caller waits %.4f s, memcpy "
        "%.4f s: %.2f of it\n",
        blocked.wall, copy, blocked.wall / copy);
  } else {
    absl::PrintF("    unverified %.4f s\n", unverified.wall);
  }
  Fresh("dsd");
  Fresh("torch");
}

constexpr int kTensors = 16;
constexpr int64_t kColumns = 1024;

// argument: rows, directory.
DSD_RANK_PROGRAM(LoadRank) {
  int64_t rows = 0;
  char directory[512];
  if (std::sscanf(rank.argument().c_str(), "%ld %511s", &rows, directory) !=
      2) {
    return absl::InvalidArgumentError("argument");
  }
  DSD_ASSIGN_OR_RETURN(auto comm, rank.Connect("gloo"));
  const Layout layout = Must(Layout::FromPlacements(
      {rows, kColumns}, DeviceMesh::Iota({comm->size()}), {Shard(0)}));
  Tensors target(kTensors, layout, comm->rank(), false);
  double best = 1e9;
  checkpoint::LoadReport report;
  double cpu = 0;
  for (int i = 0; i < 3; ++i) {
    DSD_RETURN_IF_ERROR(comm->Barrier());
    const double before = CpuSeconds();
    const absl::Time start = absl::Now();
    DSD_ASSIGN_OR_RETURN(report,
                         checkpoint::Load(directory, target.state, comm.get()));
    DSD_RETURN_IF_ERROR(comm->Barrier());
    const double wall = absl::ToDoubleSeconds(absl::Now() - start);
    if (wall < best) {
      best = wall;
      cpu = CpuSeconds() - before;
    }
  }
  rank.Record("wall", absl::StrCat(best));
  rank.Record("cpu", absl::StrCat(cpu));
  rank.Record("read", absl::StrCat(report.payload_bytes_all));
  rank.Record("right", absl::StrCat(target.IsRight() && report.verified));
  return comm->Shutdown();
}

DSD_RANK_PROGRAM(SaveRank) {
  int64_t rows = 0;
  char directory[512];
  if (std::sscanf(rank.argument().c_str(), "%ld %511s", &rows, directory) !=
      2) {
    return absl::InvalidArgumentError("argument");
  }
  DSD_ASSIGN_OR_RETURN(auto comm, rank.Connect("gloo"));
  const Layout layout = Must(Layout::FromPlacements(
      {rows, kColumns}, DeviceMesh::Iota({comm->size()}), {Shard(0)}));
  Tensors source(kTensors, layout, comm->rank(), true);
  DSD_RETURN_IF_ERROR(
      checkpoint::Save(directory, source.state, comm.get()).status());
  return comm->Shutdown();
}

// Row 12.
void Reshard(int64_t bytes) {
  const int64_t rows = bytes / 4 / kTensors / kColumns;
  const std::string directory = Fresh("four");
  RankRunOptions options;
  options.timeout = absl::Minutes(5);
  options.argument = absl::StrCat(rows, " ", directory);
  for (const RankResult& result : RunRanks(4, "SaveRank", options)) {
    Must(result.status);
  }
  Seconds ours;
  bool right = true;
  std::string read;
  for (RankResult& result : RunRanks(2, "LoadRank", options)) {
    Must(result.status);
    ours.wall = std::max(ours.wall, std::stod(result.values["wall"]));
    ours.cpu += std::stod(result.values["cpu"]);
    right &= result.values["right"] == "1";
    read = result.values["read"];
  }
  const Json peer =
      LeastOfPeer(absl::StrCat("reshard ", directory, " 2 ", kTensors, " ",
                               rows, " ", kColumns),
                  2);
  Row("12. load of 1 GiB on 2 ranks, saved on 4, warm cache", ToSeconds(peer),
      ours);
  absl::PrintF("    %s bytes read from storage over all ranks, of %d\n", read,
               bytes);
  Verdict("reshard", right && peer["right"] && read == absl::StrCat(bytes));
  Fresh("four");
}

// Row 17.
void Digests(int64_t bytes) {
  AlignedBuffer buffer(bytes);
  for (int64_t i = 0; i < bytes; ++i) {
    buffer.data()[i] = static_cast<std::byte>(i * 7);
  }
  const absl::Span<const std::byte> all(buffer.data(), bytes);
  // In CPU seconds: one core is meant, whatever else runs.
  const double copy = Memcpy(bytes).cpu;
  for (const DigestVersion version : {DigestVersion::k2, DigestVersion::k1}) {
    const double seconds = LeastOf(
                               5, [] {},
                               [&] {
                                 ContentDigest digest(bytes, version);
                                 digest.AddRun(0, all);
                               })
                               .cpu;
    absl::PrintF(
        "17. content digest, version %d: %.2f GB/s; memcpy %.2f GB/s: "
        "%.2f of it\n",
        static_cast<int>(version), static_cast<double>(bytes) / seconds / 1e9,
        static_cast<double>(bytes) / copy / 1e9, copy / seconds);
  }
  // A column shard: many short runs.
  for (const int64_t width : {64, 512}) {
    const int64_t rows = bytes / 4 / 4096;
    const double seconds =
        LeastOf(
            3, [] {},
            [&] {
              ContentDigest digest(rows * 4096 * 4);
              digest.AddBox({rows, 4096}, 4, {0, 1024}, {rows, 1024 + width}, 0,
                            rows * width, all.first(rows * width * 4));
            })
            .cpu;
    absl::PrintF("    of columns of %d bytes: %.2f GB/s\n", width * 4,
                 static_cast<double>(rows * width * 4) / seconds / 1e9);
  }
}

// `rows`: of targets; empty: all.
int Run(const std::vector<std::string>& rows, bool quick) {
  const auto wanted = [&](const char* row) {
    return rows.empty() || std::count(rows.begin(), rows.end(), row) > 0;
  };
  const int64_t gib = quick ? int64_t{1} << 26 : int64_t{1} << 30;
  if (wanted("17")) Digests(std::min(gib, int64_t{1} << 28));
  if (wanted("9")) BigIndex(quick ? 2784 : 44544, 8);
  if (wanted("10")) {
    SaveAndLoad(quick ? "64 MiB" : "1 GiB", kTensors, gib / 4 / kTensors,
                quick ? 2 : 3);
  }
  if (wanted("10s")) {
    SaveAndLoad(quick ? "1000 tensors of 64 B" : "10000 tensors of 64 B",
                quick ? 1000 : 10000, 16, 3);
  }
  if (wanted("12")) Reshard(gib);
  return same ? 0 : 1;
}

}  // namespace
}  // namespace dsd

int main(int argc, char** argv) {
  const std::string program = dsd::RequestedRankProgram();
  if (!program.empty()) return dsd::RankMain(program);
  dsd::AllowRankProcesses();
  dsd::CommandLine line("Save and load of checkpoints beside PyTorch");
  std::string parent = "/tmp";
  std::vector<std::string> rows;
  line.app.add_option("--directory", parent, "where files are written");
  line.app.add_option("--rows", rows, "of 9, 10, 10s, 12, 17")->delimiter(',');
  CLI11_PARSE(line.app, argc, argv);
  dsd::peer_command = line.peer();
  dsd::root = absl::StrCat(parent, "/dsd_checkpoint_benchmark_", getpid());
  std::filesystem::create_directories(dsd::root);
  const int result = dsd::Run(rows, line.quick);
  std::filesystem::remove_all(dsd::root);
  return result;
}
