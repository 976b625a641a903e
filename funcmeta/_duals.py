"""Where forward mode over a gradient gives the derivative of that gradient, and how the library tells.

For a loss ℓ with gradient g, the tangent of g along v is what reverse mode makes of g, vᵀ ∂g/∂z, only where torch's
backward rules are derivatives of its forward ones, and where these rules carry tangents. Hooks, ``padding_idx`` and an
``autograd.Function`` can break the first, some of torch's own formulas break the second, and neither is an error in
torch. So the graph of a loss has to consist of nodes that are known to be good, and what a graph does not show is
watched for while the loss runs.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd.graph import Node

from funcmeta._errors import GraphError


class TangentError(GraphError):
    """Forward mode would not give what reverse mode gives."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(
            f"Forward mode would not give the derivative of an inner gradient, because {why}. Use reverse mode: "
            f"Reverse(), or torch.func.vjp in the place of torch.func.jvp."
        )


def pushing() -> bool:
    """Whether tangents are pushed here by ``torch.func.jvp``."""
    return any(level.key() == TransformType.Jvp for level in get_interpreter_stack() or ())


def has_tangent(tensors: Iterable[Tensor]) -> bool:
    """Whether one of these tensors carries a tangent of ``torch.autograd.forward_ad``."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(each).tangent is not None for each in tensors)  # type: ignore[no-untyped-call]


def obstacle(nodes: Iterable[Node]) -> str:
    """Why tangents may not go through the gradient of a graph, or nothing; a clause that can follow "because"."""
    for node in nodes:
        kind = type(node).__name__
        if kind in GOOD:
            if kind.startswith("Embedding") and (altered := _altered(node)):
                return altered
        elif kind in WRONG:
            return f"torch differentiates the gradient of {WRONG[kind]} wrongly in forward mode"
        elif (function := getattr(node, "_forward_cls", None)) is not None:
            return f"the inner loss runs the autograd.Function {function.__name__}"
        else:
            return f"the inner loss runs {kind}, whose gradient is not known to be right in forward mode"
    return ""


def _altered(node: Any) -> str:
    """What an embedding does to its gradient, which is then no derivative."""
    if node._saved_scale_grad_by_freq:
        return "the gradient of an embedding with scale_grad_by_freq is not the derivative of the embedding"
    if node._saved_padding_idx < node._saved_weight_sym_argsize_0:  # torch keeps -1, for none, as 2**64 - 1
        return "the gradient of an embedding with padding_idx is not the derivative of the embedding"
    return "the inner loss uses an embedding with sparse gradients" if node._saved_sparse else ""


class Watch:
    """What torch's functions are called for that changes a gradient and does not show in its graph.

    Hooks for saved tensors, as those of ``torch.utils.checkpoint``, are no such thing: torch keeps the tangent of a
    saved tensor beside what the hook packs.
    """

    def trouble(self, function: Any) -> str:
        """Why tangents may not go through what calls this function, or nothing."""
        if torch.compiler.is_compiling():
            return ""
        if function is Tensor.register_hook:
            return "the inner loss registers a hook, which may change a gradient on its way"
        if function == _READ_NODE:
            return "the inner loss reads a grad_fn, to which hooks can be added"
        return ""


_READ_NODE = vars(torch._C.TensorBase)["grad_fn"].__get__

WRONG = {
    "AsStridedScatterBackward0": "torch.as_strided_scatter",
    "CumprodBackward0": "torch.cumprod",
    "LinalgDetBackward0": "torch.linalg.det",
    "LinalgSlogdetBackward0": "torch.linalg.slogdet",
    "LinalgSolveExBackward0": "torch.linalg.solve",
    "MaxUnpool2DBackward0": "max_unpool2d",
    "MaxUnpool3DBackward0": "max_unpool3d",
    "ScatterReduceBackward0": "torch.scatter_reduce",
    "TriangularSolveBackward0": "torch.triangular_solve",
}
"""Nodes of torch 2.13 whose backward pass, run with tangents, gives wrong ones without an error: most of these read
what the forward pass saved without its tangent."""

_FIRST = """
Abs Acos Acosh AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add Addbmm Addcdiv Addcmul
Addmm Addmv Addr Amax Amin Aminmax Angle AsStrided Asin Asinh Atan2 Atan Atanh AvgPool2D AvgPool3D Baddbmm
BatchNormWithUpdate Bernoulli BinaryCrossEntropy BinaryCrossEntropyWithLogits BlockDiag Bmm Cat Ceil Celu
ChannelShuffle Cholesky CholeskySolve Clamp ClampMin Clone Complex Conj ConjPhysical ConstantPadNd Convolution
Copysign Cos Cosh Cummax Cummin Cumsum Deg2Rad DiagEmbed Diagonal DiagonalScatter Digamma Dist Div Dot Elu Embedding
Erf Erfc Erfinv Exp2 Exp Expand Expm1 FftC2C FftC2R FftR2C Fill Flip Floor Fmax Fmin Frac FractionalMaxPool2D
FractionalMaxPool3D Frexp Gather Gelu Glu GridSampler2D GridSampler3D Hardshrink Hardswish Hardtanh Hypot I0 Im2Col
IndexAdd Index IndexCopy IndexFill IndexPut IndexReduce IndexSelect Kthvalue Ldexp LeakyRelu Lerp Lgamma
LinalgCholeskyEx LinalgCross LinalgEig LinalgEigh LinalgHouseholderProduct LinalgInvEx LinalgLstsq LinalgLu
LinalgLuFactorEx LinalgLuSolve LinalgMatrixExp LinalgPinv LinalgQr LinalgSolveTriangular LinalgSvd LinalgVectorNorm
Log10 Log1P Log2 Log LogSigmoid LogSoftmax Logaddexp2 Logaddexp Logcumsumexp Logit Logsumexp LuUnpack MaskedFill
MaskedScatter MaskedSelect Max MaxPool2DWithIndices MaxPool2DWithIndicesBackward MaxPool3DWithIndices Maximum Mean
Median Min Minimum Mm Mode Mul Mv Mvlgamma NanToNum Nanmedian Nansum NarrowCopy NativeBatchNorm NativeBatchNormLegit
NativeDropoutBackward NativeGroupNorm Neg Nextafter NllLoss2D NllLoss Ormqr Permute PixelShuffle PixelUnshuffle
Polar Polygamma Pow PreluKernel Prod Put Rad2Deg Reciprocal ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu
Renorm Repeat ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias Roll Rot90 Round RreluWithNoise Rsqrt
Rsub SafeSoftmax ScatterAdd Scatter Select SelectScatter Sgn Sigmoid Sign Sin Sinc Sinh Slice SmoothL1Loss
SoftMarginLoss Softmax SoftmaxBackwardData Softplus Softshrink Sort SpecialEntr SpecialErfcx SpecialI0E SpecialI1
SpecialI1E SpecialLogNdtr SpecialNdtri SpecialXlog1Py Split SplitWithSizes Sqrt Squeeze Stack Std StdMean Sub Sum T
Take Tan Tanh Threshold ToCopy Topk Trace Transpose Tril Trilinear Triu Trunc Unbind Unfold UnsafeMaskedIndex
UnsafeMaskedIndexPutAccumulate UnsafeSplit UnsafeView Unsqueeze UpsampleBicubic2D UpsampleBilinear2DAa
UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D
UpsampleNearestExact2D UpsampleTrilinear3D Var VarMean Vdot ViewAsComplex ViewAsReal View Where Xlogy Zero
"""
_OTHER = """
AccumulateGrad AddBackward1 AliasBackward0_copy AsStridedBackward0_copy ClampBackward1 ClampMaxBackward1
ClampMinBackward1 CopyBackwards CopySlices CopysignBackward1 DiagonalBackward0_copy DivBackward1 DivBackward2
ExpandBackward0_copy FmodBackward1 IndexFillBackward1 LerpBackward1 MaskedFillBackward1 MaxBackward1 MeanBackward1
MedianBackward1 MinBackward1 MulBackward1 NanmedianBackward1 NativeBatchNormLegitBackward1 NormBackward1
NormalBackward1 NormalBackward3 PermuteBackward0_copy PowBackward1 PowBackward2 ProdBackward1 RemainderBackward0
RemainderBackward1 RoundBackward1 RsubBackward1
ScatterBackward1 SortBackward1 SplitWithSizesBackward0_copy SqueezeBackward0_copy SqueezeBackward1
SqueezeBackward1_copy SqueezeBackward2 SqueezeBackward4 SubBackward1 SumBackward1 TBackward0_copy
TransposeBackward0_copy TransposeBackward1 UnbindBackward0_copy UnfoldBackward0_copy UnsqueezeBackward0_copy
ViewBackward0_copy
"""
GOOD = frozenset([f"{name}Backward0" for name in _FIRST.split()]) | frozenset(_OTHER.split())
"""Nodes of torch 2.13 for which forward over reverse equals reverse over reverse, or is an error that says so.

Found by running every operation of torch's own table (``torch.testing._internal.common_methods_invocations.op_db``) on
its sample inputs in double precision, inside a nonlinear function, both ways; ``tests/test_duals.py`` does it again.
"""


def is_gradient(
    slopes: Sequence[Tensor | None],
    along: Sequence[Tensor | None],
    tangent: Tensor | None,
    room: float,
    precision: float,
) -> bool:
    """Whether the tangent of the loss along v is ⟨g, v⟩, as it is unless a backward rule is no derivative.

    Near a minimum both are rounding errors of a sum that cancels. A move of θ by its last places changes ⟨g, v⟩ by
    eps · |θ| · |Hv|, which ``room`` is without the eps.
    """
    pairs = [(g.detach(), v) for g, v in zip(slopes, along, strict=False) if g is not None and v is not None]
    rate = 0.0 if tangent is None else float(tangent.detach())
    if not pairs:
        return rate == 0.0
    expected = float(torch.stack([torch.dot(g.reshape(-1), v.reshape(-1)) for g, v in pairs]).sum())
    norms = [torch.stack(torch._foreach_norm(list(each))) for each in zip(*pairs, strict=True)]
    scale = float(torch.dot(*norms))
    if math.isnan(rate) or math.isnan(expected):
        return math.isnan(rate) and math.isnan(expected)
    return abs(rate - expected) <= precision * max(scale, abs(rate)) + 64 * precision**2 * room


def room_of(thetas: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> float:
    """|θ| · |Hv|, in double precision, as v may be tiny."""
    pairs = [(theta.detach(), by.detach()) for theta, by in zip(thetas, tangents, strict=False) if by is not None]
    sizes = [torch.stack(torch._foreach_norm(list(each))).double().norm() for each in zip(*pairs, strict=True)]
    return float(sizes[0] * sizes[1]) if sizes else 0.0
