// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/oracle/state_dict/job.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/arange.h"
#include "ATen/ops/empty.h"
#include "ATen/ops/full.h"
#include "ATen/ops/ones.h"
#include "ATen/ops/scalar_tensor.h"
#include "ATen/ops/zeros.h"
#include "absl/algorithm/container.h"
#include "absl/functional/function_ref.h"
#include "absl/log/check.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/core/layout/placement.h"
#include "dsd/core/state_dict/state_dict.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/tensor_value.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/frontends/parallel/fully_shard.h"
#include "dsd/frontends/torch/state_dict.h"
#include "libdeflate.h"
#include "torch/nn/modules/batchnorm.h"
#include "torch/nn/modules/conv.h"
#include "torch/nn/modules/embedding.h"
#include "torch/nn/modules/linear.h"
#include "torch/nn/modules/normalization.h"
#include "torch/optim/adagrad.h"
#include "torch/optim/adam.h"
#include "torch/optim/adamw.h"
#include "torch/optim/rmsprop.h"
#include "torch/optim/sgd.h"

namespace dsd::oracle {
namespace {

namespace nn = torch::nn;
namespace optim = torch::optim;
using Words = std::vector<std::string>;

int64_t Number(absl::string_view text) {
  int64_t value = 0;
  CHECK(absl::SimpleAtoi(text, &value)) << text;
  return value;
}

c10::ScalarType ScalarTypeOf(absl::string_view name) {
  const auto dtype = ParseDType(name);
  CHECK(dtype.has_value()) << name;
  return ToScalarType(*dtype);
}

// "3x4"; "" for a 0-dim tensor.
Dims ShapeOf(absl::string_view text) {
  Dims shape;
  for (const absl::string_view extent :
       absl::StrSplit(text, 'x', absl::SkipEmpty())) {
    shape.push_back(Number(extent));
  }
  return shape;
}

// Values.

uint32_t CrcOf(const at::Tensor& tensor) {
  const at::Tensor packed = tensor.detach().contiguous();
  return libdeflate_crc32(0, packed.const_data_ptr(), packed.nbytes());
}

int64_t ModulusOf(c10::ScalarType type) {
  switch (type) {
    case c10::kBFloat16:
    case c10::kByte:
      return 251;
    case c10::kHalf:
      return 2039;
    case c10::kBool:
      return 2;
    default:
      return 8388593;
  }
}

// As pattern() in state_dict_oracle.py.
at::Tensor Pattern(const std::string& tag, const Dims& shape,
                   c10::ScalarType type) {
  const int64_t count = Box::Whole(shape).num_elements();
  const int64_t start = libdeflate_crc32(0, tag.data(), tag.size());
  return at::arange(count, c10::kLong)
      .mul_(17)
      .add_(start)
      .remainder_(ModulusOf(type))
      .to(type)
      .reshape(ToIntArrayRef(shape));
}

at::Tensor Cut(const at::Tensor& whole, const std::optional<Sharding>& where) {
  if (!where.has_value()) return whole;
  const std::optional<Dims> shape = where->layout.LocalShape(where->holder);
  CHECK(shape.has_value());
  at::Tensor local = at::empty(ToIntArrayRef(*shape), whole.scalar_type());
  for (const LocalBox& part : where->layout.BoxesOf(where->holder)) {
    at::Tensor to = local;
    at::Tensor from = whole;
    for (int d = 0; d < part.box.ndim(); ++d) {
      to = to.narrow(d, part.local_lo[d], part.box.extent(d));
      from = from.narrow(d, part.box.lo[d], part.box.extent(d));
    }
    to.copy_(from);
  }
  return local;
}

// Text.

std::string TextOf(const std::optional<Sharding>& where,
                   const at::Tensor& local) {
  const std::string type(DTypeName(*ToDType(local.scalar_type())));
  const std::string shape = DimsToString(ToDims(local.sizes()));
  const std::string crc = absl::StrFormat("%08x", CrcOf(local));
  if (!where.has_value())
    return absl::StrCat("tensor ", type, " ", shape, " ", crc);
  return absl::StrCat("distributed ", type, " ", where->layout.ToString(),
                      " local ", shape, " ", crc);
}

std::string TextOf(const TensorValue& value) {
  std::optional<Sharding> where;
  if (!value.is_plain()) where = Sharding{value.layout(), value.holder()};
  return TextOf(where, *value.Local());
}

std::string TextOf(const Value& value);

std::string TextOf(const std::vector<Value>& items) {
  return absl::StrJoin(items, ", ", [](std::string* out, const Value& item) {
    absl::StrAppend(out, TextOf(item));
  });
}

std::string TextOf(const Value& value) {
  if (const auto* v = value.get_if<TensorValue>()) return TextOf(*v);
  if (const auto* v = value.get_if<Value::List>()) {
    return absl::StrCat("[", TextOf(*v), "]");
  }
  if (const auto* v = value.get_if<Value::Tuple>()) {
    return absl::StrCat("(", TextOf(v->items), ")");
  }
  if (const auto* v = value.get_if<double>()) {
    return absl::StrFormat("float %.17g", *v);
  }
  if (const auto* v = value.get_if<int64_t>()) return absl::StrCat("int ", *v);
  if (const auto* v = value.get_if<bool>()) {
    return *v ? "bool True" : "bool False";
  }
  if (const auto* v = value.get_if<std::string>()) {
    return absl::StrCat("str ", *v);
  }
  return value.is<None>() ? "None" : std::string(value.kind_name());
}

void AddLines(const std::string& path, const Value& value, Lines& lines) {
  const auto below = [&path](absl::string_view key) {
    return path.empty() ? std::string(key) : absl::StrCat(path, "/", key);
  };
  if (const auto* list = value.get_if<Value::List>()) {
    if (absl::c_any_of(*list,
                       [](const Value& v) { return v.is<StateDict>(); })) {
      for (size_t i = 0; i < list->size(); ++i) {
        AddLines(below(absl::StrCat(i)), (*list)[i], lines);
      }
      return;
    }
  }
  const auto* dict = value.get_if<StateDict>();
  if (dict == nullptr) {
    lines.push_back(absl::StrCat(path, " ", TextOf(value)));
  } else if (dict->empty()) {
    if (!path.empty()) lines.push_back(absl::StrCat(path, " {}"));
  } else {
    for (size_t i = 0; i < dict->size(); ++i) {
      AddLines(below(dict->key_text(i)), dict->value(i), lines);
    }
  }
}

// Models.

struct Node : nn::Module {};

struct NamedTensor {
  std::string name;
  at::Tensor tensor;
  bool is_parameter;
};

class Model {
 public:
  Model(const GoldenFile& file, const Configuration& c, bool cast,
        Communicator* comm)
      : comm_(comm) {
    const Lines& lines = file.models.at(c.of("model"));
    std::map<std::string, std::string> ties;
    for (const std::string& line : lines) {
      const Words words = absl::StrSplit(line, ' ');
      if (words[0] == "tie") ties[words[1]] = words[2];
    }
    for (const std::string& line : lines) {
      const Words words = absl::StrSplit(line, ' ');
      if (words[0] == "tie") continue;
      if (words[0] == "share") {
        Register(words[1], modules_.at(words[2]));
        continue;
      }
      Build(words, ties, cast ? c.of("cast") : "no");
    }
    Place(c);
  }

  // The module that calls are made with.
  nn::Module& module() { return *outer_; }

  // As in Python's state_dict(): both names of tied tensors.
  std::vector<NamedTensor> All() const {
    std::vector<NamedTensor> all;
    Collect("", *root_, all);
    return all;
  }

  // Parameters under their first names.
  std::vector<NamedTensor> Parameters() const {
    std::vector<NamedTensor> out;
    for (NamedTensor& item : All()) {
      if (item.is_parameter &&
          absl::c_none_of(out, [&](const NamedTensor& other) {
            return other.tensor.is_same(item.tensor);
          })) {
        out.push_back(std::move(item));
      }
    }
    return out;
  }

  // How a parameter of this name and shape is distributed; nullopt: plain.
  std::optional<Layout> LayoutOf(const Configuration& c,
                                 const std::string& name,
                                 const Dims& shape) const {
    if (c.Is("placement", "plain") || shape.empty()) return std::nullopt;
    const std::string& cut = cuts_.at(name);
    const Placement tp = absl::StartsWith(cut, "S(")
                             ? Shard(static_cast<int>(Number(cut.substr(2, 1))))
                             : Replicate();
    Dims mesh = {2, 2};
    std::vector<Placement> placements;
    if (c.Is("placement", "fsdp") || c.Is("placement", "tp")) {
      mesh = {c.world()};
      placements = {c.Is("placement", "tp") ? tp : Shard(0)};
    } else if (c.Is("placement", "hsdp")) {
      placements = {Replicate(), Shard(0)};
    } else {
      placements = {tp == Shard(0) ? StridedShard(0, 2) : Shard(0), tp};
    }
    absl::StatusOr<Layout> layout =
        Layout::FromPlacements(shape, DeviceMesh::Iota(mesh), placements);
    CHECK_OK(layout);
    return *std::move(layout);
  }

  Lines Text() const {
    Lines lines;
    for (const NamedTensor& item : All()) {
      lines.push_back(absl::StrCat(
          item.name, " ",
          TextOf(ShardingTable::Global().Find(item.tensor), item.tensor)));
    }
    return lines;
  }

 private:
  static void Collect(const std::string& prefix, const nn::Module& module,
                      std::vector<NamedTensor>& all) {
    for (const auto& item : module.named_parameters(/*recurse=*/false)) {
      all.push_back({prefix + item.key(), item.value(), true});
    }
    for (const auto& item : module.named_buffers(/*recurse=*/false)) {
      all.push_back({prefix + item.key(), item.value(), false});
    }
    for (const auto& item : module.named_children()) {
      Collect(absl::StrCat(prefix, item.key(), "."), *item.value(), all);
    }
  }

  static std::string CastName(const std::string& type,
                              const std::string& cast) {
    if (cast == "narrow" && type == "float32") return "bfloat16";
    if (cast == "narrow" && type == "float64") return "float32";
    if (cast == "wide" && type == "float32") return "float64";
    return type;
  }

  void Register(const std::string& path,
                const std::shared_ptr<nn::Module>& module) {
    std::shared_ptr<nn::Module> parent = root_;
    const Words segments = absl::StrSplit(path, '.');
    for (size_t i = 0; i + 1 < segments.size(); ++i) {
      const auto children = parent->named_children();
      const auto* child = children.find(segments[i]);
      parent = child != nullptr ? *child
                                : parent->register_module(
                                      segments[i], std::make_shared<Node>());
    }
    parent->register_module(segments.back(), module);
    modules_[path] = module;
  }

  // "path class arguments dtype placements".
  void Build(const Words& words, const std::map<std::string, std::string>& ties,
             const std::string& cast) {
    const std::string& path = words[0];
    size_t at = 2;
    while (!ParseDType(words[at]).has_value()) ++at;
    const c10::ScalarType type = ScalarTypeOf(CastName(words[at], cast));
    const absl::Span<const std::string> arguments =
        absl::MakeConstSpan(words).subspan(2, at - 2);

    std::shared_ptr<nn::Module> module;
    const std::string tied = absl::StrCat(path, ".weight");
    if (ties.count(tied) > 0) {
      // Registered twice, as a module of one's own would do it.
      module = std::make_shared<Node>();
      for (const NamedTensor& item : All()) {
        if (item.name == ties.at(tied)) {
          module->register_parameter("weight", item.tensor);
        }
      }
    } else if (words[1] == "Loose") {
      module = BuildLoose(arguments, type, cast);
    } else {
      module = BuildLayer(words[1], arguments[0]);
      const auto cast_to = [type](at::Tensor tensor) {
        if (tensor.is_floating_point()) tensor.set_data(tensor.to(type));
      };
      for (const auto& item : module->named_parameters()) cast_to(item.value());
      for (const auto& item : module->named_buffers()) cast_to(item.value());
    }
    size_t i = at;
    for (const auto& item : module->named_parameters()) {
      cuts_[absl::StrCat(path, ".", item.key())] = words[++i];
    }
    Register(path, module);
  }

  static std::shared_ptr<nn::Module> BuildLoose(
      absl::Span<const std::string> arguments, c10::ScalarType type,
      const std::string& cast) {
    auto module = std::make_shared<Node>();
    for (const std::string& argument : arguments) {
      const std::pair<std::string, std::string> named =
          absl::StrSplit(argument, '=');
      const Words shape_and_type = absl::StrSplit(named.second, ':');
      const Dims shape = ShapeOf(shape_and_type[0]);
      if (shape_and_type.size() == 1) {
        module->register_parameter(named.first,
                                   at::zeros(ToIntArrayRef(shape), type));
      } else {
        module->register_buffer(
            named.first,
            at::zeros(ToIntArrayRef(shape),
                      ScalarTypeOf(CastName(shape_and_type[1], cast))));
      }
    }
    return module;
  }

  static std::shared_ptr<nn::Module> BuildLayer(const std::string& kind,
                                                const std::string& arguments) {
    std::vector<int64_t> n;
    bool bias = true;
    for (const absl::string_view argument : absl::StrSplit(arguments, ',')) {
      if (argument == "nobias") {
        bias = false;
      } else {
        n.push_back(Number(argument));
      }
    }
    if (kind == "Linear") {
      return nn::Linear(nn::LinearOptions(n[0], n[1]).bias(bias)).ptr();
    }
    if (kind == "Embedding") return nn::Embedding(n[0], n[1]).ptr();
    if (kind == "Conv2d") {
      return nn::Conv2d(nn::Conv2dOptions(n[0], n[1], n[2]).bias(bias)).ptr();
    }
    if (kind == "BatchNorm2d") return nn::BatchNorm2d(n[0]).ptr();
    CHECK_EQ(kind, "LayerNorm");
    return nn::LayerNorm(nn::LayerNormOptions({n[0]})).ptr();
  }

  void Place(const Configuration& c) {
    outer_ = root_;
    if (c.Is("placement", "plain")) return;
    const std::vector<NamedTensor> parameters = Parameters();
    const bool has_scalar = absl::c_any_of(
        parameters, [](const NamedTensor& p) { return p.tensor.dim() == 0; });
    if (c.Is("placement", "fsdp") && !has_scalar) {
      outer_ =
          MakeFullyShard(root_, std::make_shared<FullyShardContext>(comm_));
      return;
    }
    for (const NamedTensor& p : parameters) {
      const std::optional<Layout> layout =
          LayoutOf(c, p.name, ToDims(p.tensor.sizes()));
      if (!layout.has_value()) continue;
      at::Tensor parameter = p.tensor;
      parameter.set_data(
          Cut(parameter.detach(), Sharding{*layout, comm_->rank()}));
      CHECK_OK(ShardingTable::Global().Set(parameter, *layout, comm_->rank()));
    }
  }

  Communicator* comm_;
  std::shared_ptr<Node> root_ = std::make_shared<Node>();
  std::shared_ptr<nn::Module> outer_;
  std::map<std::string, std::shared_ptr<nn::Module>> modules_;
  std::map<std::string, std::string> cuts_;  // by parameter
};

Dims GlobalShape(const at::Tensor& tensor) {
  const auto where = ShardingTable::Global().Find(tensor);
  return where.has_value() ? where->layout.shape() : ToDims(tensor.sizes());
}

// The pattern of `tag`, distributed as `tensor` is.
at::Tensor PatternLike(const std::string& tag, const at::Tensor& tensor) {
  return Cut(Pattern(tag, GlobalShape(tensor), tensor.scalar_type()),
             ShardingTable::Global().Find(tensor));
}

// Optimizers.

using Hyperparameters = std::map<std::string, std::string>;

double ToDouble(absl::string_view text) {
  double value = 0;
  CHECK(absl::SimpleAtod(text, &value)) << text;
  return value;
}

// Makes, fills and prints optimizers of one class by the class's own interface.
class Kind {
 public:
  struct Group {
    std::vector<at::Tensor> params;
    Hyperparameters hyperparameters;
  };
  virtual ~Kind() = default;
  virtual std::unique_ptr<optim::Optimizer> Make(
      const std::vector<Group>& groups,
      const Hyperparameters& defaults) const = 0;
  virtual void Fill(
      optim::Optimizer& optimizer, const at::Tensor& param, int64_t step,
      const std::vector<std::string>& entries,
      absl::FunctionRef<at::Tensor(const std::string& entry)> value) const = 0;
  virtual void AddText(optim::Optimizer& optimizer, const at::Tensor& param,
                       const std::vector<std::string>& entries,
                       const std::string& prefix, Lines& lines) const = 0;
};

template <class Options, class State>
struct Accessors {
  using Pair = std::tuple<double, double>;
  std::map<std::string, std::variant<double& (*)(Options&), bool& (*)(Options&),
                                     Pair& (*)(Options&)>>
      hyperparameters;
  int64_t& (*step)(State&) = nullptr;
  std::map<std::string, at::Tensor& (*)(State&)> tensors;
};

template <class Optimizer, class Options, class State>
class TypedKind : public Kind {
 public:
  explicit TypedKind(Accessors<Options, State> accessors)
      : accessors_(std::move(accessors)) {}

  std::unique_ptr<optim::Optimizer> Make(
      const std::vector<Group>& groups,
      const Hyperparameters& defaults) const override {
    std::vector<optim::OptimizerParamGroup> made;
    for (const Group& group : groups) {
      Hyperparameters values = defaults;
      for (const auto& [name, value] : group.hyperparameters) {
        values[name] = value;
      }
      made.emplace_back(group.params,
                        std::make_unique<Options>(OptionsOf(values)));
    }
    return std::make_unique<Optimizer>(std::move(made), OptionsOf(defaults));
  }

  void Fill(
      optim::Optimizer& optimizer, const at::Tensor& param, int64_t step,
      const std::vector<std::string>& entries,
      absl::FunctionRef<at::Tensor(const std::string&)> value) const override {
    auto state = std::make_unique<State>();
    for (const std::string& entry : entries) {
      if (entry == "step") {
        accessors_.step(*state) = step;
      } else {
        accessors_.tensors.at(entry)(*state) = value(entry);
      }
    }
    optimizer.state()[param.unsafeGetTensorImpl()] = std::move(state);
  }

  void AddText(optim::Optimizer& optimizer, const at::Tensor& param,
               const std::vector<std::string>& entries,
               const std::string& prefix, Lines& lines) const override {
    const auto it = optimizer.state().find(param.unsafeGetTensorImpl());
    if (it == optimizer.state().end()) return;
    auto& state = static_cast<State&>(*it->second);
    for (const std::string& entry : entries) {
      if (entry == "step") {
        const at::Tensor step =
            at::scalar_tensor(accessors_.step(state), c10::kFloat);
        lines.push_back(
            absl::StrCat(prefix, "step ", TextOf(std::nullopt, step)));
        continue;
      }
      const at::Tensor& tensor = accessors_.tensors.at(entry)(state);
      if (!tensor.defined()) continue;
      lines.push_back(
          absl::StrCat(prefix, entry, " ",
                       TextOf(ShardingTable::Global().Find(param), tensor)));
    }
  }

 private:
  Options OptionsOf(const Hyperparameters& values) const {
    Options options(/*lr=*/0.0);
    for (const auto& [name, text] : values) {
      const std::string& value = text;
      std::visit(
          [&](const auto access) {
            auto& field = access(options);
            using Field = std::decay_t<decltype(field)>;
            if constexpr (std::is_same_v<Field, bool>) {
              field = value == "True";
            } else if constexpr (std::is_same_v<Field, double>) {
              field = ToDouble(value);
            } else {
              const std::pair<std::string, std::string> both =
                  absl::StrSplit(value, ',');
              field = {ToDouble(both.first), ToDouble(both.second)};
            }
          },
          accessors_.hyperparameters.at(name));
    }
    return options;
  }

  const Accessors<Options, State> accessors_;
};

std::unique_ptr<Kind> MakeSgd() {
  using O = optim::SGDOptions;
  using S = optim::SGDParamState;
  Accessors<O, S> a;
  a.hyperparameters = {
      {"lr", +[](O& o) -> double& { return o.lr(); }},
      {"momentum", +[](O& o) -> double& { return o.momentum(); }},
      {"dampening", +[](O& o) -> double& { return o.dampening(); }},
      {"weight_decay", +[](O& o) -> double& { return o.weight_decay(); }},
      {"nesterov", +[](O& o) -> bool& { return o.nesterov(); }},
  };
  a.tensors = {{"momentum_buffer",
                +[](S& s) -> at::Tensor& { return s.momentum_buffer(); }}};
  return std::make_unique<TypedKind<optim::SGD, O, S>>(std::move(a));
}

template <class Optimizer, class O, class S>
std::unique_ptr<Kind> MakeAdam() {
  using Pair = typename Accessors<O, S>::Pair;
  Accessors<O, S> a;
  a.hyperparameters = {
      {"lr", +[](O& o) -> double& { return o.lr(); }},
      {"betas", +[](O& o) -> Pair& { return o.betas(); }},
      {"eps", +[](O& o) -> double& { return o.eps(); }},
      {"weight_decay", +[](O& o) -> double& { return o.weight_decay(); }},
      {"amsgrad", +[](O& o) -> bool& { return o.amsgrad(); }},
  };
  a.step = +[](S& s) -> int64_t& { return s.step(); };
  a.tensors = {
      {"exp_avg", +[](S& s) -> at::Tensor& { return s.exp_avg(); }},
      {"exp_avg_sq", +[](S& s) -> at::Tensor& { return s.exp_avg_sq(); }},
      {"max_exp_avg_sq",
       +[](S& s) -> at::Tensor& { return s.max_exp_avg_sq(); }},
  };
  return std::make_unique<TypedKind<Optimizer, O, S>>(std::move(a));
}

std::unique_ptr<Kind> MakeAdagrad() {
  using O = optim::AdagradOptions;
  using S = optim::AdagradParamState;
  Accessors<O, S> a;
  a.hyperparameters = {
      {"lr", +[](O& o) -> double& { return o.lr(); }},
      {"lr_decay", +[](O& o) -> double& { return o.lr_decay(); }},
      {"weight_decay", +[](O& o) -> double& { return o.weight_decay(); }},
      {"initial_accumulator_value",
       +[](O& o) -> double& { return o.initial_accumulator_value(); }},
      {"eps", +[](O& o) -> double& { return o.eps(); }},
  };
  a.step = +[](S& s) -> int64_t& { return s.step(); };
  a.tensors = {{"sum", +[](S& s) -> at::Tensor& { return s.sum(); }}};
  return std::make_unique<TypedKind<optim::Adagrad, O, S>>(std::move(a));
}

std::unique_ptr<Kind> MakeRmsprop() {
  using O = optim::RMSpropOptions;
  using S = optim::RMSpropParamState;
  Accessors<O, S> a;
  a.hyperparameters = {
      {"lr", +[](O& o) -> double& { return o.lr(); }},
      {"alpha", +[](O& o) -> double& { return o.alpha(); }},
      {"eps", +[](O& o) -> double& { return o.eps(); }},
      {"weight_decay", +[](O& o) -> double& { return o.weight_decay(); }},
      {"momentum", +[](O& o) -> double& { return o.momentum(); }},
      {"centered", +[](O& o) -> bool& { return o.centered(); }},
  };
  a.step = +[](S& s) -> int64_t& { return s.step(); };
  a.tensors = {
      {"square_avg", +[](S& s) -> at::Tensor& { return s.square_avg(); }},
      {"momentum_buffer",
       +[](S& s) -> at::Tensor& { return s.momentum_buffer(); }},
      {"grad_avg", +[](S& s) -> at::Tensor& { return s.grad_avg(); }},
  };
  return std::make_unique<TypedKind<optim::RMSprop, O, S>>(std::move(a));
}

std::unique_ptr<Kind> MakeKind(const std::string& name) {
  if (name == "SGD") return MakeSgd();
  if (name == "Adam") {
    return MakeAdam<optim::Adam, optim::AdamOptions, optim::AdamParamState>();
  }
  if (name == "AdamW") {
    return MakeAdam<optim::AdamW, optim::AdamWOptions,
                    optim::AdamWParamState>();
  }
  if (name == "Adagrad") return MakeAdagrad();
  CHECK_EQ(name, "RMSprop");
  return MakeRmsprop();
}

// A model with its optimizers: side "A" is saved, "B" is live when A is set.
class Job {
 public:
  Job(const GoldenFile& file, const Configuration& c, const std::string& side,
      const std::string& state, const std::string& order, Communicator* comm)
      : comm_(comm), model_(file, c, /*cast=*/side == "B", comm) {
    {
      const c10::NoGradGuard no_grad;
      for (NamedTensor& item : model_.All()) {
        // A tied tensor has the values of its first name.
        const bool is_alias =
            item.is_parameter &&
            absl::c_none_of(model_.Parameters(), [&](const NamedTensor& p) {
              return p.name == item.name;
            });
        if (is_alias) continue;
        item.tensor.copy_(PatternLike(side + "/" + item.name, item.tensor));
      }
    }
    parameters_ = model_.Parameters();
    if (!c.Is("frozen", "no")) parameters_[0].tensor.requires_grad_(false);
    if (c.Is("optimizer", "none")) return;
    const OptimizerSpec& spec = file.optimizers.at(c.of("optimizer"));
    entries_ = spec.entries;
    kind_ = MakeKind(spec.kind);
    MakeOptimizers(c, spec, side, order == "swapped");
    if (state != "untouched") FillState(c, side, state == "partial");
  }

  Model& model() { return model_; }
  bool has_optimizers() const { return !optimizers_.empty(); }

  Optimizers optimizers() const {
    std::vector<optim::Optimizer*> list;
    for (const auto& optimizer : optimizers_) list.push_back(optimizer.get());
    return list;
  }

  // What the optimizers hold; hyperparameters as dsd reads them.
  Lines OptimizerText() {
    Lines lines;
    for (size_t o = 0; o < optimizers_.size(); ++o) {
      optim::Optimizer& optimizer = *optimizers_[o];
      const auto dict =
          GetOptimizerStateDict(model_.module(), optimizer, comm_);
      CHECK_OK(dict);
      const auto* groups = dict->Find("param_groups")->get_if<Value::List>();
      for (size_t g = 0; g < groups->size(); ++g) {
        AddLines(absl::StrCat("optimizer ", o, " group ", g), (*groups)[g],
                 lines);
        for (const at::Tensor& param : optimizer.param_groups()[g].params()) {
          const auto name = absl::c_find_if(
              parameters_,
              [&](const NamedTensor& p) { return p.tensor.is_same(param); });
          kind_->AddText(
              optimizer, param, entries_,
              absl::StrCat("optimizer ", o, " state ", name->name, "/"), lines);
        }
      }
    }
    return lines;
  }

 private:
  void MakeOptimizers(const Configuration& c, const OptimizerSpec& spec,
                      const std::string& side, bool swap) {
    Hyperparameters defaults;
    for (const auto& [name, value] : spec.hyperparameters.at(side)) {
      defaults[name] = value;
    }
    const size_t half = (parameters_.size() + 1) / 2;
    std::vector<at::Tensor> all;
    for (const NamedTensor& p : parameters_) all.push_back(p.tensor);
    std::vector<Kind::Group> halves(2);
    halves[0].params.assign(all.begin(), all.begin() + half);
    halves[1].params.assign(all.begin() + half, all.end());
    const double lr = ToDouble(defaults.at("lr"));
    const std::string& groups = c.of("groups");
    if (groups == "one" || groups == "reversed" || groups == "subset") {
      Kind::Group group;
      group.params = groups == "subset" ? halves[0].params : all;
      if ((groups == "reversed") != swap) absl::c_reverse(group.params);
      optimizers_.push_back(kind_->Make({group}, defaults));
      return;
    }
    if (groups == "two") {
      halves[1].hyperparameters["lr"] = absl::StrCat(lr / 4);
    } else if (groups == "two_explicit") {
      halves[1].hyperparameters = {{"weight_decay", "0.75"},
                                   {"lr", absl::StrCat(lr / 8)}};
    }
    if (swap) absl::c_reverse(halves);
    if (groups == "two_optimizers") {
      for (const Kind::Group& group : halves) {
        optimizers_.push_back(kind_->Make({group}, defaults));
      }
    } else {
      optimizers_.push_back(kind_->Make(halves, defaults));
    }
  }

  void FillState(const Configuration& c, const std::string& side,
                 bool all_but_last) {
    if (entries_.empty()) return;
    for (const auto& optimizer : optimizers_) {
      for (const auto& group : optimizer->param_groups()) {
        for (const at::Tensor& param : group.params()) {
          const auto p = absl::c_find_if(
              parameters_,
              [&](const NamedTensor& n) { return n.tensor.is_same(param); });
          if (all_but_last && p + 1 == parameters_.end()) continue;
          if (p == parameters_.begin() && c.Is("frozen", "fresh")) continue;
          kind_->Fill(*optimizer, param, side == "A" ? 3 : 5, entries_,
                      [&](const std::string& entry) {
                        return PatternLike(
                            absl::StrCat(side, "/", p->name, "/", entry),
                            param);
                      });
        }
      }
    }
  }

  Communicator* comm_;
  Model model_;
  std::vector<NamedTensor> parameters_;
  std::vector<std::string> entries_;
  std::unique_ptr<Kind> kind_;
  std::vector<std::unique_ptr<optim::Optimizer>> optimizers_;
};

Lines Raised(const absl::Status& status) {
  return {absl::StrCat("raised ", status.ToString())};
}

Lines GotText(const absl::StatusOr<StateDict>& dict) {
  if (!dict.ok()) return Raised(dict.status());
  Lines lines = {"ok"};
  AddLines("", Value(*dict), lines);
  return lines;
}

// As edit() in state_dict_oracle.py.
void Edit(const Configuration& c, const std::string& second_key,
          StateDict& model, StateDict& optimizers) {
  const std::string& edit = c.of("edit");
  if (edit == "drop" || edit == "drop_and_extra") {
    model.Erase(PathSegment(second_key));
  }
  if (edit == "extra" || edit == "drop_and_extra") {
    model.Set("gone.weight", Value(TensorValue(at::ones({3}))));
  }
  if (edit == "shape") {
    model.value(0) = Value(TensorValue(at::ones({7, 7, 7})));
  }
  if (optimizers.empty()) return;
  Value* const state = optimizers.Find("state");
  const Value one(TensorValue(at::scalar_tensor(1.0, c10::kFloat)));
  if (edit == "drop_state") {
    if (state != nullptr) {
      auto& states = *state->get_if<StateDict>();
      std::string last;
      for (size_t i = 0; i < states.size(); ++i) {
        last = std::max(last, absl::StrCat(states.key_text(i), "."));
      }
      if (!last.empty()) {
        states.Erase(PathSegment(last.substr(0, last.size() - 1)));
      }
    } else {
      std::vector<std::string> keys;
      for (size_t i = 0; i < optimizers.size(); ++i) {
        if (absl::StartsWith(optimizers.key_text(i), "state.")) {
          keys.push_back(optimizers.key_text(i));
        }
      }
      absl::c_sort(keys);
      const std::string prefix =
          keys.empty() ? "" : keys.back().substr(0, keys.back().rfind('.') + 1);
      for (const std::string& key : keys) {
        if (absl::StartsWith(key, prefix)) optimizers.Erase(key);
      }
    }
  }
  if (edit == "extra_state" && state != nullptr) {
    StateDict entries;
    entries.Set("step", one);
    state->get_if<StateDict>()->Set("gone.weight", Value(entries));
    auto& groups = *optimizers.Find("param_groups")->get_if<Value::List>();
    groups[0]
        .get_if<StateDict>()
        ->Find("params")
        ->get_if<Value::List>()
        ->push_back(Value("gone.weight"));
  } else if (edit == "extra_state") {
    optimizers.Set("state.gone.weight.step", one);
    optimizers.Set("param_groups.gone.weight.lr", Value(0.5));
  }
}

std::string KeysText(const char* what, std::vector<std::string> keys) {
  absl::c_sort(keys);
  return absl::StrCat(
      what, " [",
      absl::StrJoin(keys, ", ",
                    [](std::string* out, const std::string& key) {
                      absl::StrAppend(out, "'", key, "'");
                    }),
      "]");
}

// "[3, 4] ..."; the text behind the brackets remains.
Dims TakeShape(absl::string_view& text) {
  const size_t end = text.find(']');
  Dims shape;
  for (const absl::string_view extent :
       absl::StrSplit(text.substr(1, end - 1), ", ", absl::SkipEmpty())) {
    shape.push_back(Number(extent));
  }
  text.remove_prefix(std::min(text.size(), end + 2));
  return shape;
}

Placement TakePlacement(absl::string_view& text) {
  if (absl::ConsumePrefix(&text, "R")) return Replicate();
  const bool strided = absl::ConsumePrefix(&text, "SS(");
  if (!strided) text.remove_prefix(2);
  const int dim = static_cast<int>(Number(text.substr(0, 1)));
  const size_t end = text.find(')');
  const int64_t factor = strided ? Number(text.substr(3, end - 3)) : 1;
  text.remove_prefix(end + 1);
  return strided ? StridedShard(dim, factor) : Shard(dim);
}

std::string TextLike(
    absl::string_view like, int rank,
    absl::FunctionRef<at::Tensor(const Dims&, c10::ScalarType)> make) {
  const bool plain = absl::ConsumePrefix(&like, "tensor ");
  if (!plain) CHECK(absl::ConsumePrefix(&like, "distributed "));
  const size_t space = like.find(' ');
  const c10::ScalarType type = ScalarTypeOf(like.substr(0, space));
  like.remove_prefix(space + 1);
  const Dims shape = TakeShape(like);
  const at::Tensor whole = make(shape, type);
  if (plain) return TextOf(std::nullopt, whole);
  CHECK(absl::ConsumePrefix(&like, "mesh"));
  const Dims mesh = TakeShape(like);
  std::vector<Placement> placements = {TakePlacement(like)};
  while (absl::ConsumePrefix(&like, ",")) {
    placements.push_back(TakePlacement(like));
  }
  const auto layout =
      Layout::FromPlacements(shape, DeviceMesh::Iota(mesh), placements);
  CHECK_OK(layout);
  const Sharding where{*layout, rank};
  return TextOf(where, Cut(whole, where));
}

}  // namespace

Outcome Get(const GoldenFile& file, const Configuration& c,
            Communicator* comm) {
  Job job(file, c, "A", c.of("state"), "same", comm);
  StateDictOptions options;
  options.full_state_dict = c.Has("get_full");
  options.cpu_offload = c.Has("get_offload");
  options.ignore_frozen_params = c.Has("ignore_frozen");
  options.strict = c.Has("get_strict");
  options.broadcast_from_rank0 = c.Has("get_broadcast");
  options.flatten_optimizer_state_dict = c.Has("get_flat");
  nn::Module& module = job.model().module();
  if (c.Is("api", "both")) {
    const auto both = GetStateDict(module, job.optimizers(), comm, options);
    if (!both.ok()) return {Raised(both.status()), Raised(both.status())};
    return {GotText(both->model), GotText(both->optimizer)};
  }
  Outcome out;
  out.model = GotText(GetModelStateDict(module, comm, options));
  out.optimizers = {"ok"};
  if (job.has_optimizers()) {
    out.optimizers =
        GotText(GetOptimizerStateDict(module, job.optimizers(), comm, options));
  }
  return out;
}

Outcome Set(const GoldenFile& file, const Configuration& c,
            Communicator* comm) {
  Job saved(file, c, "A", "stepped", "same", comm);
  StateDictOptions options;
  options.full_state_dict = !c.Is("set_from", "shards");
  options.ignore_frozen_params = c.Has("ignore_frozen");
  options.flatten_optimizer_state_dict = !c.Is("set_form", "nested");
  absl::StatusOr<ModelAndOptimizerStateDict> dicts =
      GetStateDict(saved.model().module(), saved.optimizers(), comm, options);
  if (!dicts.ok()) {
    const Lines lines = {
        absl::StrCat("nothing to set: ", dicts.status().ToString())};
    return {lines, lines};
  }
  Edit(c, saved.model().All()[1].name, dicts->model, dicts->optimizer);

  Job live(file, c, "B", c.of("live"), c.of("order"), comm);
  const bool apart = c.Is("api", "apart");
  const bool broadcast = c.Is("set_from", "broadcast");
  if (broadcast && apart && comm->rank() != 0) *dicts = {};
  options.cpu_offload = c.Has("set_offload");
  options.strict = c.Has("set_strict");
  options.broadcast_from_rank0 = broadcast;
  options.flatten_optimizer_state_dict = c.Is("set_form", "flat_flag");
  const Lines model_before = live.model().Text();
  const Lines optimizers_before = live.OptimizerText();

  nn::Module& module = live.model().module();
  absl::StatusOr<IncompatibleKeys> keys;
  absl::Status optimizer_status;
  if (apart) {
    keys = SetModelStateDict(module, dicts->model, comm, options);
    if (live.has_optimizers()) {
      optimizer_status = SetOptimizerStateDict(module, live.optimizers(),
                                               dicts->optimizer, comm, options);
    }
  } else {
    keys = SetStateDict(module, live.optimizers(), dicts->model,
                        dicts->optimizer, comm, options);
    optimizer_status = keys.status();
  }

  Outcome out;
  const Lines model_after = live.model().Text();
  const Lines optimizers_after = live.OptimizerText();
  if (keys.ok()) {
    out.model = {"ok", KeysText("missing", keys->missing_keys),
                 KeysText("unexpected", keys->unexpected_keys)};
    out.model.insert(out.model.end(), model_after.begin(), model_after.end());
  } else {
    out.model = Raised(keys.status());
    if (model_after != model_before) out.model.push_back("but changed values");
  }
  if (optimizer_status.ok()) {
    out.optimizers = {"ok"};
    out.optimizers.insert(out.optimizers.end(), optimizers_after.begin(),
                          optimizers_after.end());
  } else {
    out.optimizers = Raised(optimizer_status);
    if (optimizers_after != optimizers_before) {
      out.optimizers.push_back("but changed values");
    }
  }
  return out;
}

std::vector<KeyInfo> KeysOf(const GoldenFile& file, const Configuration& c,
                            const std::string& side) {
  Configuration plain = c;
  plain.axes["placement"] = "plain";
  const Model model(file, plain, /*cast=*/side == "B", nullptr);
  const std::vector<NamedTensor> parameters = model.Parameters();
  std::vector<KeyInfo> keys;
  for (const NamedTensor& item : model.All()) {
    KeyInfo& key = keys.emplace_back();
    key.name = key.canonical = item.name;
    key.is_parameter = item.is_parameter;
    const Dims shape = ToDims(item.tensor.sizes());
    std::optional<Layout> layout;
    if (item.is_parameter) {
      key.canonical = absl::c_find_if(parameters, [&](const NamedTensor& p) {
                        return p.tensor.is_same(item.tensor);
                      })->name;
      layout = model.LayoutOf(c, key.canonical, shape);
    }
    const auto type = DTypeName(*ToDType(item.tensor.scalar_type()));
    key.like = layout.has_value()
                   ? absl::StrCat("distributed ", type, " ", layout->ToString())
                   : absl::StrCat("tensor ", type, " ", DimsToString(shape));
  }
  return keys;
}

std::string ConstantText(const std::string& like, int rank, double value) {
  return TextLike(like, rank, [&](const Dims& shape, c10::ScalarType type) {
    return at::full(ToIntArrayRef(shape), value, type);
  });
}

std::string PatternText(const std::string& like, int rank,
                        const std::string& tag) {
  return TextLike(like, rank, [&](const Dims& shape, c10::ScalarType type) {
    return Pattern(tag, shape, type);
  });
}

}  // namespace dsd::oracle
