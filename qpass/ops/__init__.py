"""The vocabulary that the passes speak: ``torch.ops.qpass.*``, each op with a plain-torch meaning and a fake.

    linear              canonical spelling of every linear layer, before quantization
    norm                canonical spelling of RMSNorm and LayerNorm
    quantized_linear    the same with codes in place of the weight: what every lowering must compute
    packed_linear       the generated kernels' entry, its weight in their layout
    packed_embedding    rows out of the same layout: an embedding that shares its head's weight
    attention           softmax attention over spans of a static cache
    rope_append         q|k|v with queries and keys rotated, keys and values written to the cache
    chain               calls of the native ops above, one behind the other, as one op

Importing this package registers all of them.
"""

from qpass.ops import attention as _attention
from qpass.ops import chain as _chain
from qpass.ops import linear as _linear
from qpass.ops import norm as _norm
from qpass.ops import packed_embedding as _packed_embedding
from qpass.ops import packed_linear as _packed_linear
from qpass.ops import quantized_linear as _quantized_linear
from qpass.ops import rope_append as _rope_append

__all__ = [
    "_attention",
    "_chain",
    "_linear",
    "_norm",
    "_packed_embedding",
    "_packed_linear",
    "_quantized_linear",
    "_rope_append",
]
