// SPDX-License-Identifier: Apache-2.0
//
// Included before each file of Gloo. Its event loop asks each new connection
// for the name of the peer, only to show it, and ends the process if there is
// none: a rank that dies right after it has connected would take the others
// along. With this the name is empty, and the first read tells of the end.

#ifndef DSD_THIRD_PARTY_GLOO_DSD_PEER_NAME_H_
#define DSD_THIRD_PARTY_GLOO_DSD_PEER_NAME_H_

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

static inline int dsd_peer_name(int fd, struct sockaddr* name,
                                socklen_t* size) {
  const int result = getpeername(fd, name, size);
  if (result == 0 || errno != ENOTCONN) return result;
  memset(name, 0, *size);
  return 0;
}

#define getpeername dsd_peer_name

#endif  // DSD_THIRD_PARTY_GLOO_DSD_PEER_NAME_H_
