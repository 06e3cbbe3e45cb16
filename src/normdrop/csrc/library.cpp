// Every operator of normdrop, on one page. The kernels register themselves at the end of their
// own files; fake kernels and autograd are in Python, in normdrop/ops.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "base/dispatch.h"

STABLE_TORCH_LIBRARY(normdrop, m) {
  // Batch normalization (batch_norm/batch_norm.cpp, batch_norm/update.cpp).
  //
  // y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), x: (N, C, ...), where
  // act(z) = z for z > 0 and slope * z elsewhere: slope 1 is the identity, 0 is ReLU. In training
  // mean and var are the batch's, var biased; else they are running_mean and running_var. Both
  // are given back in float64. `positive` has one bit an element, the sign of what went into the
  // activation, where backward cannot work it out from x alone; else it is empty. With a seed, y is
  // dropped out with dropout's mask and multiplied by drop_scale where it is kept.
  m.def(
      "batch_norm(Tensor x, Tensor? running_mean, Tensor? running_var, Tensor? weight, "
      "Tensor? bias, Tensor? residual, bool training, float eps, float slope, "
      "Tensor? seed=None, int threshold=4294967296, float drop_scale=1.0, SymInt sample_offset=0) "
      "-> (Tensor y, Tensor mean, Tensor var, Tensor positive)");
  m.def(
      "batch_norm_backward(Tensor grad_y, Tensor x, Tensor mean, Tensor var, Tensor? weight, "
      "Tensor? bias, Tensor positive, bool training, float eps, float slope, bool need_x, "
      "bool need_vectors, bool need_residual, "
      "Tensor? seed=None, int threshold=4294967296, float drop_scale=1.0, SymInt sample_offset=0) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");
  // r <- (1 - momentum) r + momentum * batch, with the unbiased variance n / (n - 1) * var.
  // nonfinite: 0 propagates, 1 skips the update, 2 raises.
  m.def(
      "batch_norm_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, "
      "Tensor var, SymInt count, float momentum, int nonfinite) -> ()");

  // Dropout (dropout/dropout.cpp).
  //
  // y = scale * x + shift where the mask keeps, fill where it drops; shift and fill are 0 but for
  // alpha dropout. The mask is a function of the seed and of the element's logical index, counted
  // from sample 0 of the whole batch; see mask/random.h. threshold = round(keep * 2^32). All
  // elements along shared_dims (in [0, x.dim())) share one draw.
  m.def(
      "dropout(Tensor x, Tensor seed, int threshold, float scale, float shift, float fill, "
      "SymInt sample_offset, int[] shared_dims) -> Tensor");
  // The same into y, which has x's shape and type and may be x itself.
  m.def(
      "dropout_into(Tensor x, Tensor seed, int threshold, float scale, float shift, float fill, "
      "SymInt sample_offset, int[] shared_dims, Tensor(a!) y) -> ()");

  // Convolution (conv2d/conv2d.cpp): 3x3, stride 1, padding 1, float32; y has channels_last.
  //
  // y[n, k, i, j] = bias[k] + sum over c, r, s of weight[k, c, r, s] x[n, c, i + r - 1, j + s - 1],
  // x being zero outside its map. What is not needed comes back empty.
  m.def("conv2d(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "conv2d_backward(Tensor grad_y, Tensor x, Tensor weight, bool need_x, bool need_weight) "
      "-> (Tensor grad_x, Tensor grad_weight)");

  // Which instruction set the kernels use here (base/dispatch.h): 0 baseline, 1 AVX2, 2 AVX-512.
  m.def("instruction_set() -> int");
}

namespace {

int64_t instruction_set() { return static_cast<int64_t>(normdrop::this_isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(normdrop, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

// What `import normdrop._C` runs: nothing. Loading the file has registered the operators.
extern "C" PyMODINIT_FUNC PyInit__C(void);
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
