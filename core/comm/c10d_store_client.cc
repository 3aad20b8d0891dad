// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/c10d_store_client.h"

#include <cstdint>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {
namespace {

// The queries of the protocol that are used here; integers are little-endian.
enum class Query : uint8_t {
  kValidate = 0,
  kSet = 1,
  kGet = 3,
  kWait = 6,
};
constexpr uint32_t kMagic = 0x3C85F7CE;
constexpr uint8_t kStopWaiting = 0;
constexpr uint64_t kMaxValueBytes = uint64_t{1} << 20;

template <class T>
void Append(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void AppendText(std::string& out, absl::string_view text) {
  Append<uint64_t>(out, text.size());
  absl::StrAppend(&out, text);
}

}  // namespace

absl::StatusOr<C10dStoreClient> C10dStoreClient::Connect(Env* env,
                                                         absl::string_view host,
                                                         int port,
                                                         absl::Time deadline) {
  DSD_ASSIGN_OR_RETURN(Socket socket, ConnectTo(env, host, port, deadline));
  std::string hello;
  Append(hello, Query::kValidate);
  Append(hello, kMagic);
  DSD_RETURN_IF_ERROR(socket.WriteAll(env, std::move(hello), deadline));
  return C10dStoreClient(env, std::move(socket));
}

absl::Status C10dStoreClient::Set(absl::string_view key,
                                  absl::string_view value,
                                  absl::Time deadline) {
  std::string query;
  Append(query, Query::kSet);
  AppendText(query, key);
  AppendText(query, value);
  DSD_RETURN_IF_ERROR(socket_.WriteAll(env_, std::move(query), deadline));
  // The server does not acknowledge, but it answers in order.
  DSD_ASSIGN_OR_RETURN(const std::string stored, Get(key, deadline));
  if (stored != value) {
    return absl::FailedPreconditionError(absl::StrCat(
        "key \"", key, "\" of the agent's store was set by another process"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> C10dStoreClient::Get(absl::string_view key,
                                                 absl::Time deadline) {
  std::string wait;
  Append(wait, Query::kWait);
  Append<uint64_t>(wait, 1);
  AppendText(wait, key);
  DSD_RETURN_IF_ERROR(socket_.WriteAll(env_, std::move(wait), deadline));
  DSD_ASSIGN_OR_RETURN(const std::string verdict,
                       socket_.ReadExactly(env_, 1, deadline));
  if (static_cast<uint8_t>(verdict[0]) != kStopWaiting) {
    return absl::UnavailableError(
        absl::StrCat("the wait for key \"", key, "\" was refused"));
  }
  std::string get;
  Append(get, Query::kGet);
  AppendText(get, key);
  DSD_RETURN_IF_ERROR(socket_.WriteAll(env_, std::move(get), deadline));
  DSD_ASSIGN_OR_RETURN(const std::string head,
                       socket_.ReadExactly(env_, sizeof(uint64_t), deadline));
  uint64_t size;
  std::memcpy(&size, head.data(), sizeof(size));
  if (size > kMaxValueBytes) {
    return absl::DataLossError(
        absl::StrCat("the value of key \"", key, "\" has ", size, " bytes"));
  }
  return socket_.ReadExactly(env_, size, deadline);
}

}  // namespace dsd
