#include "torch/language_model.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/custom_class.h>

#include <mutex>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "mambaquant/gemm.h"
#include "mambaquant/language_model.h"
#include "torch/backend.h"
#include "torch/checks.h"
#include "torch/hadamard_sizes.h"

namespace mambaquant::binding {
namespace {

using Sizes = c10::Dict<std::string, int64_t>;
using Tensors = c10::Dict<std::string, Tensor>;

constexpr OpName kOp{"LanguageModel"};

// Looks tensors up by name and checks each as it is taken.
class Reader {
 public:
  explicit Reader(const Tensors& tensors) : tensors_(tensors) {}

  template <typename T>
  const T* take(const std::string& name, at::IntArrayRef shape) const {
    const OptionalTensor tensor = find(name);
    TORCH_CHECK_VALUE(tensor.has_value(), kOp.name, ": expected a tensor ", name, ", got none");
    TORCH_CHECK_VALUE(tensor->is_cpu(), kOp.name, ": expected ", name, " on the CPU, got ",
                      tensor->device());
    check_parameter(kOp, *tensor, c10::CppTypeToScalarType<T>::value, shape, *tensor, name.c_str(),
                    "as the sizes say");
    return tensor->const_data_ptr<T>();
  }

  template <typename T>
  const T* take_optional(const std::string& name, at::IntArrayRef shape) const {
    return find(name).has_value() ? take<T>(name, shape) : nullptr;
  }

  LinearWeight linear(const std::string& name, int64_t n, int64_t k) const {
    LinearWeight w;
    w.n = n;
    w.k = k;
    w.packed = take<int8_t>(name + ".packed", {packed_gemm_weight_bytes(n, k)});
    w.scale = take<float>(name + ".scale", {n});
    w.acc_offset = take_optional<int32_t>(name + ".acc_offset", {n});
    w.bias = take_optional<float>(name + ".bias", {n});
    return w;
  }

  OptionalTensor find(const std::string& name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? OptionalTensor() : OptionalTensor(found->value());
  }

 private:
  const Tensors& tensors_;
};

int64_t size_of(const Sizes& sizes, const char* name) {
  const auto found = sizes.find(name);
  TORCH_CHECK_VALUE(found != sizes.end() && found->value() >= 1, kOp.name, ": expected a size ",
                    name, " of at least 1");
  return found->value();
}

class LanguageModelHolder : public torch::CustomClassHolder {
 public:
  // sizes: hidden, dim, dstate, dt_rank, width, blocks, and vocab where there is an embedding; tensors: by the names of
  // mambaquant/language_model.h. layout: of the packed weights. The tensors must not change afterwards.
  LanguageModelHolder(const Sizes& sizes, int64_t layout, double norm_eps, bool rotates_out,
                      bool rotates_state, Tensors tensors)
      : tensors_(std::move(tensors)), layout_(layout), one_(at::ones({1}, at::kFloat)) {
    model_.hidden = size_of(sizes, "hidden");
    model_.dim = size_of(sizes, "dim");
    model_.dstate = size_of(sizes, "dstate");
    model_.dt_rank = size_of(sizes, "dt_rank");
    model_.width = size_of(sizes, "width");
    if (sizes.contains("vocab")) model_.vocab = size_of(sizes, "vocab");
    model_.rotate_state = rotates_state;
    if (rotates_out) {
      const HadamardBase* base = find_hadamard_base(model_.dim);
      TORCH_CHECK_VALUE(base != nullptr, kOp.name, ": expected dim of ",
                        unsupported_hadamard_size(model_.dim));
      model_.hadamard_base_order = base->order;
    }
    const Reader reader(tensors_);
    const auto eps = static_cast<float>(norm_eps);
    read_ends(reader, eps);
    for (int64_t i = 0; i < size_of(sizes, "blocks"); ++i) {
      blocks_.push_back(read_block(reader, "blocks." + std::to_string(i) + ".", eps));
    }
    model_.num_blocks = static_cast<int64_t>(blocks_.size());
    model_.blocks = blocks_.data();
  }

  // Advances the states by `ids` (batch, seqlen), or by `x` (batch, seqlen, hidden) where ids is none, and fills what is
  // given of y (batch, seqlen, hidden), last (batch, hidden) and logits (batch, vocab). One call at a time; others wait.
  void forward(const OptionalTensor& ids, const OptionalTensor& x, const Tensor& conv_state,
               const Tensor& ssm_state, const OptionalTensor& y, const OptionalTensor& last,
               const OptionalTensor& logits) {
    check_isa();
    const LanguageModel& m = model_;
    LanguageModelParams p;
    p.model = &m;
    read_input(ids, x, &p);
    check_parameter(kOp, conv_state, at::kChar, {m.num_blocks, p.batch, m.width - 1, m.dim}, one_,
                    "conv_state", "(blocks, batch, width - 1, dim)");
    check_parameter(kOp, ssm_state, at::kFloat, {m.num_blocks, p.batch, m.dstate, m.dim}, one_,
                    "ssm_state", "(blocks, batch, dstate, dim)");
    check_parameter(kOp, y, at::kFloat, {p.batch, p.seqlen, m.hidden}, one_, "y",
                    "(batch, seqlen, hidden)");
    check_parameter(kOp, last, at::kFloat, {p.batch, m.hidden}, one_, "last", "(batch, hidden)");
    check_parameter(kOp, logits, at::kFloat, {p.batch, m.vocab}, one_, "logits", "(batch, vocab)");
    TORCH_CHECK_VALUE(!logits.has_value() || m.head_norm_weight != nullptr, kOp.name,
                      ": expected no logits from a model without an int8 head");
    p.conv_state = conv_state.mutable_data_ptr<int8_t>();
    p.ssm_state = ssm_state.mutable_data_ptr<float>();
    p.y = mutable_data_or_null(y);
    p.last = mutable_data_or_null(last);
    p.logits = mutable_data_or_null(logits);
    const std::scoped_lock lock(mutex_);
    const Threads threads = torch_threads();
    const int64_t bytes =
        cpu::language_model_workspace_bytes(m, p.batch, p.seqlen, threads.num_threads);
    if (!workspace_.defined() || workspace_.numel() < bytes) {
      workspace_ = at::empty({bytes}, at::kChar);
    }
    p.workspace = workspace_.mutable_data_ptr<int8_t>();
    check_status(kOp, cpu::language_model(p, threads));
  }

 private:
  static float* mutable_data_or_null(const OptionalTensor& t) {
    return t.has_value() ? t->mutable_data_ptr<float>() : nullptr;
  }

  void check_isa() const {
    const auto layout = static_cast<int64_t>(cpu::current_isa());
    TORCH_CHECK_NOT_IMPLEMENTED(layout == layout_, kOp.name, ": expected weights packed for ",
                                cpu::isa_name(cpu::current_isa()),
                                ", which is in use; load the model again");
  }

  void read_input(const OptionalTensor& ids, const OptionalTensor& x,
                  LanguageModelParams* p) const {
    TORCH_CHECK_VALUE(ids.has_value() != x.has_value(), kOp.name, ": expected either ids or x");
    const char* const name = ids.has_value() ? "ids" : "x";
    const Tensor& input = ids.has_value() ? *ids : *x;
    check_dim(kOp, input, ids.has_value() ? 2 : 3, name);
    p->batch = input.size(0);
    p->seqlen = input.size(1);
    TORCH_CHECK_VALUE(p->batch > 0 && p->seqlen > 0, kOp.name, ": expected ", name,
                      " of at least one sequence of one token, got shape ", input.sizes());
    check_parameter(kOp, ids, at::kLong, {p->batch, p->seqlen}, one_, "ids", "(batch, seqlen)");
    check_parameter(kOp, x, at::kFloat, {p->batch, p->seqlen, model_.hidden}, one_, "x",
                    "(batch, seqlen, hidden)");
    if (ids.has_value()) {
      TORCH_CHECK_VALUE(model_.embedding != nullptr, kOp.name,
                        ": expected x from a model without an embedding, got ids");
      check_ids(*ids);
    }
    p->ids = data_or_null<int64_t>(ids);
    p->x = data_or_null<float>(x);
  }

  void check_ids(const Tensor& ids) const {
    const int64_t* values = ids.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < ids.numel(); ++i) {
      TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < model_.vocab, kOp.name,
                        ": expected ids below ", model_.vocab, ", got ", values[i]);
    }
  }

  void read_ends(const Reader& reader, float eps) {
    LanguageModel& m = model_;
    const OptionalTensor table = reader.find("embedding");
    if (table.has_value() && table->scalar_type() == at::kHalf) {
      m.embedding_dtype = DType::kF16;
      m.embedding = reader.take<at::Half>("embedding", {m.vocab, m.hidden});
    } else if (table.has_value()) {
      m.embedding = reader.take<int8_t>("embedding", {m.vocab, m.hidden});
      m.embedding_scale = reader.take<float>("embedding_scale", {m.vocab});
    }
    if (!reader.find("head.packed").has_value()) return;
    m.head_norm_eps = eps;
    m.head_norm_weight = reader.take<float>("head.norm_weight", {m.hidden});
    m.head_scale = reader.take<float>("head.in_scale", {1});
    m.head = reader.linear("head", m.vocab, m.hidden);
  }

  LanguageBlock read_block(const Reader& reader, const std::string& at, float eps) const {
    const LanguageModel& m = model_;
    const int64_t dtBC = m.dt_rank + 2 * m.dstate;
    LanguageBlock b;
    b.norm_eps = eps;
    b.norm_weight = reader.take_optional<float>(at + "norm_weight", {m.hidden});
    b.in_scale = reader.take<float>(at + "in_scale", {1});
    b.in_proj = reader.linear(at + "in_proj", 2 * m.dim, m.hidden);
    b.xz_scale = reader.take<float>(at + "xz_scale", {2 * m.dim});
    b.conv_weight = reader.take<int8_t>(at + "conv_weight", {m.width, m.dim});
    b.conv_weight_scale = reader.take<float>(at + "conv_weight_scale", {m.dim});
    b.conv_bias = reader.take_optional<float>(at + "conv_bias", {m.dim});
    b.x_scale = reader.take<float>(at + "x_scale", {m.dim});
    b.x_zero_point = reader.take<int32_t>(at + "x_zero_point", {m.dim});
    b.x_proj = reader.linear(at + "x_proj", dtBC, m.dim);
    b.one = one_.const_data_ptr<float>();
    b.dtBC_scale = reader.take<float>(at + "dtBC_scale", {dtBC});
    b.dt_proj = reader.linear(at + "dt_proj", m.dim, m.dt_rank);
    b.dt_bias = reader.take<float>(at + "dt_bias", {m.dim});
    b.A = reader.take<float>(at + "A", {m.dstate, m.dim});
    b.D = reader.take<float>(at + "D", {m.dim});
    b.readout_scale = reader.take_optional<float>(at + "readout_scale", {m.dim});
    b.gate_scale = reader.take<float>(at + "gate_scale", {m.dim});
    b.out_scale = reader.take<float>(at + "out_scale", {1});
    b.out_proj = reader.linear(at + "out_proj", m.hidden, m.dim);
    return b;
  }

  const Tensors tensors_;  // kept alive: the model points into them
  const int64_t layout_;
  const Tensor one_;
  LanguageModel model_;
  std::vector<LanguageBlock> blocks_;
  std::mutex mutex_;
  Tensor workspace_;
};

}  // namespace

void register_language_model(torch::Library& m) {
  m.class_<LanguageModelHolder>("LanguageModel")
      .def(torch::init<const Sizes&, int64_t, double, bool, bool, Tensors>())
      .def("forward", &LanguageModelHolder::forward);
}

}  // namespace mambaquant::binding
