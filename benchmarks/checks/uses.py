"""What tools around PyTorch do with a model: one function each, for tools.py.

A function takes a model of Conv2d, BatchNorm2d, ReLU, Dropout (with rate 0) and Linear in training
mode, and a batch of its images. It gives what the tool made of it, as something that can be
compared with what the same tool makes of torch's own layers: a number, text, or tensors.
"""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["USES", "Use"]


class Use(NamedTuple):
    """One thing that a tool is asked for.

    Attributes:
        library: the name of its distribution.
        what: what is asked, in words.
        ask: the function.
        residual: whether the tool takes a network with additions.
    """

    library: str
    what: str
    ask: Callable[[nn.Module, Tensor], Any]
    residual: bool = True

    def __str__(self) -> str:
        return f"{self.library}: {self.what}"


USES: list[Use] = []


def use(library: str, what: str, residual: bool = True) -> Callable[[Any], Any]:
    def register(ask: Callable[[nn.Module, Tensor], Any]) -> Callable[[nn.Module, Tensor], Any]:
        USES.append(Use(library, what, ask, residual))
        return ask

    return register


def triples(model: nn.Module) -> list[list[str]]:
    """The names of every convolution, its BN and, where one follows, its ReLU."""
    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    found = []
    for i, (name, module) in enumerate(leaves[:-1]):
        if isinstance(module, nn.Conv2d) and isinstance(leaves[i + 1][1], _BatchNorm):
            names = [name, leaves[i + 1][0]]
            if i + 2 < len(leaves) and isinstance(leaves[i + 2][1], nn.ReLU):
                names.append(leaves[i + 2][0])
            found.append(names)
    return found


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def count(model: nn.Module, *kinds: Any) -> int:
    return sum(isinstance(module, kinds) for module in model.modules())


# ---- Privacy and gradients of samples -----------------------------------------------------------


@use("opacus", "layers that `ModuleValidator.validate` refuses")
def _(model: nn.Module, x: Tensor) -> Any:
    from opacus.validators import ModuleValidator

    return len(ModuleValidator.validate(model))


@use("opacus", "GroupNorms that `ModuleValidator.fix` puts in")
def _(model: nn.Module, x: Tensor) -> Any:
    from opacus.validators import ModuleValidator

    return count(ModuleValidator.fix(model), nn.GroupNorm)


@use("opacus", "whether `PrivacyEngine.make_private` takes it")
def _(model: nn.Module, x: Tensor) -> Any:
    from opacus import PrivacyEngine

    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), batch_size=2
    )
    PrivacyEngine(secure_mode=False).make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    return "taken"


@use("backpack-for-pytorch", "`BatchGrad`: each sample's gradient of BN's γ", residual=False)
def _(model: nn.Module, x: Tensor) -> Any:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(model.eval())
    loss = extend(nn.CrossEntropyLoss())(model(x), torch.zeros(len(x), dtype=torch.long))
    with backpack(BatchGrad()):
        loss.backward()
    return [norm.weight.grad_batch for norm in norms(model)]


@use("torch", "`func.replace_all_batch_norm_modules_` and each sample's gradient")
def _(model: nn.Module, x: Tensor) -> Any:
    from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap

    replace_all_batch_norm_modules_(model)
    parameters = dict(model.named_parameters())

    def loss(parameters: Any, image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image[None].expand(2, -1, -1, -1),)).sum()

    return vmap(grad(loss), (None, 0))(parameters, x)


# ---- Attributions -------------------------------------------------------------------------------


@use("captum", "`LRP`", residual=False)
def _(model: nn.Module, x: Tensor) -> Any:
    from captum.attr import LRP

    return LRP(model.eval()).attribute(x.clone().requires_grad_(), target=0)


@use("captum", "`DeepLift`", residual=False)
def _(model: nn.Module, x: Tensor) -> Any:
    from captum.attr import DeepLift

    return DeepLift(model.eval()).attribute(x.clone().requires_grad_(), x.new_zeros(x.shape), 0)


@use("captum", "`GuidedBackprop`")
def _(model: nn.Module, x: Tensor) -> Any:
    from captum.attr import GuidedBackprop

    return GuidedBackprop(model.eval()).attribute(x.clone().requires_grad_(), target=0)


# ---- Quantization and folding -------------------------------------------------------------------


@use("torch", "`ao.quantization.prepare_fx`: BN layers that are left")
def _(model: nn.Module, x: Tensor) -> Any:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    prepared = prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), (x,))
    return count(prepared, _BatchNorm)


@use("torch", "`ao.quantization.prepare_qat_fx`: convolutions with their BN")
def _(model: nn.Module, x: Tensor) -> Any:
    import torch.ao.nn.intrinsic.qat as qat
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    prepared = prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (x,))
    return count(prepared, qat.ConvBn2d, qat.ConvBnReLU2d)


@use("torch", "`ao.quantization.fuse_modules`, and its numbers")
def _(model: nn.Module, x: Tensor) -> Any:
    from torch.ao.quantization import fuse_modules

    fused = fuse_modules(model.eval(), triples(model))
    return {"BN layers": count(fused, _BatchNorm), "output": fused(x)}


@use("torch", "`nn.utils.fusion.fuse_conv_bn_eval`")
def _(model: nn.Module, x: Tensor) -> Any:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model.eval()
    for convolution, norm, *_ in triples(model):
        fused = fuse_conv_bn_eval(model.get_submodule(convolution), model.get_submodule(norm))
        model.set_submodule(convolution, fused)
        model.set_submodule(norm, nn.Identity())
    return model(x)


@use("torch", "`fx.experimental.optimization.fuse`: BN layers that are left, and its numbers")
def _(model: nn.Module, x: Tensor) -> Any:
    from torch.fx.experimental.optimization import fuse

    fused = fuse(model.eval())
    return {"BN layers": count(fused, _BatchNorm), "output": fused(x)}


@use("torch", "`jit.trace` and `jit.freeze`: BN operators that are left, and its numbers")
def _(model: nn.Module, x: Tensor) -> Any:
    frozen = torch.jit.freeze(torch.jit.trace(model.eval(), (x,)))
    return {"BN operators": str(frozen.graph).count("batch_norm("), "output": frozen(x)}


@use("torch", "`jit.script`")
def _(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.script(model.eval())(x)


@use("torchao", "pt2e's `prepare_pt2e`: BN operators that are left", residual=False)
def _(model: nn.Module, x: Tensor) -> Any:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model.eval(), (x,)).module(), quantizer)
    return sum("batch_norm" in str(node.target) for node in prepared.graph.nodes)


# ---- Exchange and training ----------------------------------------------------------------------


@use("torch", "`SyncBatchNorm.convert_sync_batchnorm`, and its numbers")
def _(model: nn.Module, x: Tensor) -> Any:
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    return {"layers": count(synchronized, nn.SyncBatchNorm), "output": synchronized(x)}


@use("torch", "`optim.swa_utils.update_bn`: the statistics")
def _(model: nn.Module, x: Tensor) -> Any:
    torch.optim.swa_utils.update_bn([x[:2], x[2:]], model)
    return [norm.running_var for norm in norms(model)]


@use("torch", "`optim.swa_utils.AveragedModel`: its output")
def _(model: nn.Module, x: Tensor) -> Any:
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    model(x)
    averaged.update_parameters(model)
    return averaged.eval()(x)


@use("fvcore", "`update_bn_stats`: the statistics")
def _(model: nn.Module, x: Tensor) -> Any:
    from fvcore.nn.precise_bn import update_bn_stats

    update_bn_stats(model, [x[:2], x[2:]], 2)
    return [norm.running_var for norm in norms(model)]


@use("pytorch-lightning", "`BaseFinetuning.freeze`: what may still move")
def _(model: nn.Module, x: Tensor) -> Any:
    from pytorch_lightning.callbacks import BaseFinetuning

    BaseFinetuning.freeze(model, train_bn=False)
    y = model(x)
    frozen = sum(not p.requires_grad for p in model.parameters())
    return {"frozen": frozen, "statistics": [n.running_mean for n in norms(model)], "output": y}


@use("pytorch-ignite", "`EMAHandler`: its model's output")
def _(model: nn.Module, x: Tensor) -> Any:
    from ignite.engine import Engine
    from ignite.handlers import EMAHandler

    handler = EMAHandler(model, momentum=0.5, handle_buffers="update")
    engine = Engine(lambda engine, batch: model(batch))
    handler.attach(engine)
    engine.run([x])
    return handler.ema_model.eval()(x)


@use("torch-pruning", "channels that `BNScalePruner` leaves, and its numbers")
def _(model: nn.Module, x: Tensor) -> Any:
    import torch_pruning

    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    torch_pruning.pruner.BNScalePruner(
        model.eval(),
        x,
        importance=torch_pruning.importance.BNScaleImportance(),
        pruning_ratio=0.5,
        ignored_layers=[last],
    ).step()
    return {"channels": str([norm.num_features for norm in norms(model)]), "output": model(x)}


# ---- Counting -----------------------------------------------------------------------------------


@use("thop", "`profile`: operations")
def _(model: nn.Module, x: Tensor) -> Any:
    import thop

    return int(thop.profile(model.eval(), (x,), verbose=False)[0])


@use("fvcore", "`FlopCountAnalysis`: operations")
def _(model: nn.Module, x: Tensor) -> Any:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model.eval(), x)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return int(analysis.total())


@use("ptflops", "`get_model_complexity_info`: operations")
def _(model: nn.Module, x: Tensor) -> Any:
    from ptflops import get_model_complexity_info

    return get_model_complexity_info(
        model.eval(),
        tuple(x.shape[1:]),
        as_strings=False,
        print_per_layer_stat=False,
        backend="pytorch",
    )[0]


@use("torchinfo", "`summary`: operations")
def _(model: nn.Module, x: Tensor) -> Any:
    from torchinfo import summary

    return summary(model, input_data=x, verbose=0).total_mult_adds


@use("torch", "`utils.flop_counter`: operations forward and backward")
def _(model: nn.Module, x: Tensor) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


# ---- Export -------------------------------------------------------------------------------------


@use("torch", "`export`: operators of normdrop in the program, and its numbers")
def _(model: nn.Module, x: Tensor) -> Any:
    program = torch.export.export(model.eval(), (x,))
    private = sum("normdrop" in str(node.target) for node in program.graph.nodes)
    return {"private": private, "output": program.module()(x)}


@use("onnx", "`onnx.export` as it comes, run by onnxruntime")
def _(model: nn.Module, x: Tensor) -> Any:
    return _onnx(model, x, dynamo=True)


@use("onnx", "`onnx.export(dynamo=False)`, run by onnxruntime")
def _(model: nn.Module, x: Tensor) -> Any:
    return _onnx(model, x, dynamo=False)


def _onnx(model: nn.Module, x: Tensor, dynamo: bool) -> Tensor:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        with redirect_stdout(io.StringIO()):
            torch.onnx.export(model.eval(), (x,), path, dynamo=dynamo)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


@use("openvino", "`convert_model`, and its numbers")
def _(model: nn.Module, x: Tensor) -> Any:
    import openvino

    converted = openvino.convert_model(model.eval(), example_input=x)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(x.numpy())[0])


@use("tensorboard", "`SummaryWriter.add_graph`: BN operators in the graph")
def _(model: nn.Module, x: Tensor) -> Any:
    from torch.utils.tensorboard._pytorch_graph import graph

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        definition, _ = graph(model, (x,))
    return sum("batch_norm" in node.op for node in definition.node)
