// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/dcp/metadata.h"

#include <utility>

namespace dsd::dcp {

Box Metadata::ChunkBox(const TensorEntry& tensor, size_t index) const {
  const int ndim = tensor.ndim();
  const int64_t* at = bounds.data() + tensor.first_bound + 2 * ndim * index;
  Box box;
  box.lo.assign(at, at + ndim);
  box.hi.assign(at, at + ndim);
  for (int d = 0; d < ndim; ++d) box.hi[d] += at[ndim + d];
  return box;
}

void Metadata::AddTensor(std::string key, Path path, DType dtype, Dims shape) {
  TensorEntry tensor;
  tensor.key = std::move(key);
  tensor.path = std::move(path);
  tensor.dtype = dtype;
  tensor.dtype_name = std::string(DTypeName(dtype));
  tensor.shape = std::move(shape);
  tensor.first_chunk = locations.size();
  tensor.first_bound = bounds.size();
  tensors.push_back(std::move(tensor));
}

void Metadata::AddChunk(const Box& box, const ItemLocation& location) {
  bounds.insert(bounds.end(), box.lo.begin(), box.lo.end());
  for (int d = 0; d < box.ndim(); ++d) bounds.push_back(box.extent(d));
  locations.push_back(location);
  ++tensors.back().num_chunks;
}

int64_t NumMissingElements(const Metadata& metadata,
                           const TensorEntry& tensor) {
  int64_t missing = 1;
  for (int64_t extent : tensor.shape) missing *= extent;
  for (size_t i = 0; i < tensor.num_chunks; ++i) {
    missing -= metadata.ChunkBox(tensor, i).num_elements();
  }
  return missing;
}

}  // namespace dsd::dcp
