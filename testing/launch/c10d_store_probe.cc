// SPDX-License-Identifier: Apache-2.0
//
// Talks to a TCPStore of PyTorch's own, see c10d_store_test.py.

#include <iostream>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/c10d_store_client.h"

namespace dsd {
namespace {

absl::Status ExpectValue(const absl::StatusOr<std::string>& found,
                         absl::string_view expected) {
  DSD_RETURN_IF_ERROR(found);
  if (*found == expected) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(
      "a value of ", found->size(), " bytes, expected ", expected.size()));
}

absl::Status ExpectCode(const absl::Status& found, absl::StatusCode code) {
  if (found.code() == code) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("expected ",
                                          absl::StatusCodeToString(code),
                                          ", found ", found.ToString()));
}

absl::Status Probe(int port) {
  Env* const env = Env::Real();
  const auto in = [&](absl::Duration time) { return env->Now() + time; };
  const auto connect = [&] {
    return C10dStoreClient::Connect(env, "127.0.0.1", port,
                                    in(absl::Seconds(20)));
  };
  DSD_ASSIGN_OR_RETURN(C10dStoreClient a, connect());
  DSD_ASSIGN_OR_RETURN(C10dStoreClient b, connect());
  const std::string binary("a\0\xff\n b", 6);
  const std::string much(100000, 'x');
  for (const std::string& value : {binary, std::string(), much}) {
    DSD_RETURN_IF_ERROR(a.Set("/probe", value, in(absl::Seconds(20))));
    DSD_RETURN_IF_ERROR(
        ExpectValue(b.Get("/probe", in(absl::Seconds(20))), value));
  }
  // What Python has set, and what it will set when it has seen this.
  DSD_RETURN_IF_ERROR(
      ExpectValue(b.Get("/early", in(absl::Seconds(20))), "from Python"));
  DSD_RETURN_IF_ERROR(a.Set("/waiting", binary, in(absl::Seconds(20))));
  DSD_RETURN_IF_ERROR(
      ExpectValue(b.Get("/late", in(absl::Seconds(20))), "later"));

  // A key that does not come; a value that is no address. Each costs a client.
  DSD_RETURN_IF_ERROR(
      ExpectCode(a.Get("/never", in(absl::Milliseconds(200))).status(),
                 absl::StatusCode::kDeadlineExceeded));
  DSD_RETURN_IF_ERROR(
      ExpectCode(b.Get("/large", in(absl::Seconds(20))).status(),
                 absl::StatusCode::kDataLoss));

  // The server goes when it has the key, perhaps before it says so.
  DSD_ASSIGN_OR_RETURN(C10dStoreClient c, connect());
  absl::Status end = c.Set("/bye", "", in(absl::Seconds(20)));
  if (end.ok()) end = c.Get("/never", in(absl::Seconds(20))).status();
  return ExpectCode(end, absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace dsd

int main(int argc, char** argv) {
  int port = 0;
  if (argc != 2 || !absl::SimpleAtoi(argv[1], &port)) return 2;
  const absl::Status status = dsd::Probe(port);
  std::cout << "probe: " << status << std::endl;
  return status.ok() ? 0 : 1;
}
