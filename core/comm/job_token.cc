// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/job_token.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {
namespace {

constexpr char kAdvice[] =
    "; `openssl rand -hex 16` makes one, the same for all ranks";

absl::StatusOr<std::string> ReadToken(Env* env, const std::string& path) {
  DSD_ASSIGN_OR_RETURN(const std::unique_ptr<ReadableFile> file,
                       env->files().OpenReadable(path));
  // One more than there may be, and the end of the line.
  std::string text(std::min<int64_t>(file->size_bytes(), kMaxTokenBytes + 2),
                   '\0');
  DSD_RETURN_IF_ERROR(file->ReadAt(
      0,
      absl::MakeSpan(reinterpret_cast<std::byte*>(text.data()), text.size())));
  return std::string(absl::StripTrailingAsciiWhitespace(text));
}

}  // namespace

absl::StatusOr<std::string> FindToken(Env* env, const LaunchInfo& launch) {
  if (launch.token.empty() && launch.token_file.empty()) return "";
  if (!launch.token.empty() && !launch.token_file.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the job has both a token (DSD_TOKEN) and a file with one "
                     "(DSD_TOKEN_FILE is \"",
                     launch.token_file, "\"); expected one of them"));
  }
  std::string token = launch.token;
  std::string name = "the token of the job (DSD_TOKEN)";
  if (token.empty()) {
    name = absl::StrCat("the token in \"", launch.token_file,
                        "\" (DSD_TOKEN_FILE)");
    absl::StatusOr<std::string> read = ReadToken(env, launch.token_file);
    if (!read.ok()) return Annotate(read.status(), name);
    token = *std::move(read);
  }
  // Short ones are guessed.
  if (token.size() < kMinTokenBytes || token.size() > kMaxTokenBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, " has ", token.size() > kMaxTokenBytes ? "over " : "",
        std::min(token.size(), kMaxTokenBytes), " characters, expected ",
        kMinTokenBytes, " to ", kMaxTokenBytes, kAdvice));
  }
  return token;
}

std::string NewNonce(Env* env) {
  std::string nonce;
  while (nonce.size() < kNonceBytes) {
    const uint64_t part = env->RandomSeed();
    nonce.append(reinterpret_cast<const char*>(&part), sizeof(part));
  }
  return nonce;
}

absl::StatusOr<std::string> TokenProof(absl::string_view token, TokenSide side,
                                       absl::string_view job_id,
                                       absl::string_view client_nonce,
                                       absl::string_view server_nonce) {
  std::string text =
      side == TokenSide::kClient ? "dsd store, client" : "dsd store, server";
  for (const absl::string_view part : {client_nonce, server_nonce, job_id}) {
    const uint64_t size = part.size();
    text.append(reinterpret_cast<const char*>(&size), sizeof(size));
    absl::StrAppend(&text, part);
  }
  unsigned char out[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  if (HMAC(EVP_sha256(), token.data(), static_cast<int>(token.size()),
           reinterpret_cast<const unsigned char*>(text.data()), text.size(),
           out, &size) == nullptr) {
    return absl::InternalError("libcrypto has no HMAC-SHA-256");
  }
  return std::string(reinterpret_cast<const char*>(out), size);
}

bool SameProof(absl::string_view a, absl::string_view b) {
  return a.size() == b.size() &&
         CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace dsd
