// SPDX-License-Identifier: Apache-2.0
//
// Just enough of c10d's TCPStore (PyTorch 2.4 and later) to leave an address
// with the agent of torchrun and to find it there. Private to this package.

#ifndef DSD_CORE_COMM_C10D_STORE_CLIENT_H_
#define DSD_CORE_COMM_C10D_STORE_CLIENT_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "dsd/core/comm/socket.h"

namespace dsd {

class Env;

// Thread-compatible. After an error it is out of step and unusable.
class C10dStoreClient {
 public:
  static absl::StatusOr<C10dStoreClient> Connect(Env* env,
                                                 absl::string_view host,
                                                 int port, absl::Time deadline);

  // Returns when the server has it.
  absl::Status Set(absl::string_view key, absl::string_view value,
                   absl::Time deadline);

  // Waits for the key.
  absl::StatusOr<std::string> Get(absl::string_view key, absl::Time deadline);

 private:
  C10dStoreClient(Env* env, Socket socket)
      : env_(env), socket_(std::move(socket)) {}

  Env* env_;
  Socket socket_;
};

}  // namespace dsd

#endif  // DSD_CORE_COMM_C10D_STORE_CLIENT_H_
