"""What the native core is given: its structures, field by field. The library says their sizes when it is loaded, which must be these."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p


class Weight(Structure):
    """``kq::Weight`` of core.h: where a weight's parts lie, and its sizes."""

    _fields_ = (
        ("codes", c_void_p), ("norms", c_void_p), ("book", c_void_p), ("experts", c_int64), ("rows", c_int64), ("groups", c_int64),
        ("bits", c_int32), ("group", c_int32), ("wide_norms", c_int32), ("kind", c_int32),
    )  # fmt: skip


class Encoding(Structure):
    """``kq::Encoding`` of encode.h: a weight to be encoded, and where its parts go."""

    _fields_ = (
        ("weight", c_void_p), ("signs", c_void_p), ("books", c_void_p), ("magnitudes", c_void_p), ("scales", c_void_p),
        ("steps", c_void_p), ("subsets", c_void_p), ("packed", c_void_p), ("norms", c_void_p), ("errors", c_void_p), ("energies", c_void_p),
        ("rows", c_int64), ("width", c_int64), ("groups", c_int64), ("dtype", c_int32), ("group", c_int32),
        ("wide_norms", c_int32), ("trials", c_int32), ("count", c_int32), ("bits", c_int32 * 7),
        ("states", c_int32),
    )  # fmt: skip


class Feedback(Structure):
    """``kq::Feedback`` of feedback.h: a group of inputs to be rounded, and where its parts go."""

    _fields_ = (
        ("first", c_void_p), ("now", c_void_p), ("across", c_void_p), ("inverses", c_void_p), ("scales", c_void_p),
        ("norms", c_void_p), ("codes", c_void_p), ("values", c_void_p), ("spread", c_void_p), ("matrices", c_int64),
        ("rows", c_int64), ("first_matrix", c_int64), ("now_matrix", c_int64), ("tried", c_int32), ("unused", c_int32),
    )  # fmt: skip


class Matrix(Structure):
    """A linear layer's weight [rows, in], packed or as it is; this and what follows are those of step.h."""

    _fields_ = (
        ("packed", Weight), ("plain", c_void_p), ("bias", c_void_p), ("signs", c_void_p), ("rows", c_int64), ("inputs", c_int64),
        ("dtype", c_int32), ("bias_dtype", c_int32),
    )  # fmt: skip


class Norm(Structure):
    """A root mean square norm, or none where it has no gain."""

    _fields_ = (
        ("gain", c_void_p),
        ("epsilon", c_float),
        ("dtype", c_int32),
        ("plus_one", c_int32),
        ("unused", c_int32),
    )


class Attention(Structure):
    """An attention layer, with the norm before it."""

    _fields_ = (
        ("q", Matrix), ("k", Matrix), ("v", Matrix), ("out", Matrix), ("before", Norm), ("q_norm", Norm), ("k_norm", Norm),
        ("heads", c_int64), ("kv_heads", c_int64), ("dim", c_int64), ("scaling", c_float), ("gated", c_int32),
    )  # fmt: skip


class DeltaNet(Structure):
    """A GatedDeltaNet layer, with the norm before it."""

    _fields_ = (
        ("qkv", Matrix), ("z", Matrix), ("b", Matrix), ("a", Matrix), ("out", Matrix), ("before", Norm), ("norm", Norm),
        ("conv", c_void_p), ("conv_bias", c_void_p), ("a_log", c_void_p), ("dt_bias", c_void_p), ("key_heads", c_int64),
        ("value_heads", c_int64), ("key_dim", c_int64), ("value_dim", c_int64), ("taps", c_int64), ("conv_dtype", c_int32),
        ("a_log_dtype", c_int32), ("dt_bias_dtype", c_int32), ("unused", c_int32),
    )  # fmt: skip


class Mlp(Structure):
    """A gated MLP, with the norm before it."""

    _fields_ = (("gate", Matrix), ("up", Matrix), ("down", Matrix), ("before", Norm))


class Moe(Structure):
    """Routed experts and a shared one, with the norm before them."""

    _fields_ = (
        ("router", Matrix), ("shared_gate", Matrix), ("shared", Mlp), ("gate_up", Weight), ("down", Weight),
        ("gate_up_signs", c_void_p), ("down_signs", c_void_p), ("top_k", c_int64), ("renormalize", c_int32), ("unused", c_int32),
    )  # fmt: skip


class Hidden(Structure):
    """Hidden states [tokens, size] of a step, and where they go."""

    _fields_ = (
        ("x", c_void_p), ("out", c_void_p), ("tokens", c_int64), ("size", c_int64), ("dtype", c_int32), ("exact", c_int32),
    )  # fmt: skip


class Cache(Structure):
    """Keys and values [tokens, heads, slots, dim] by their strides, and what hides slots."""

    _fields_ = (
        ("keys", c_void_p), ("values", c_void_p), ("key_strides", c_int64 * 3), ("value_strides", c_int64 * 3),
        ("mask", c_void_p), ("mask_stride", c_int64), ("dtype", c_int32), ("mask_dtype", c_int32),
    )  # fmt: skip


class Rotary(Structure):
    """Cosines and sines of rotary embedding."""

    _fields_ = (("cos", c_void_p), ("sin", c_void_p), ("count", c_int64), ("stride", c_int64))


class Mask(Structure):
    """What hides slots, [tokens, slots], and how many slots it has."""

    _fields_ = (
        ("values", c_void_p),
        ("stride", c_int64),
        ("slots", c_int64),
        ("dtype", c_int32),
        ("unused", c_int32),
    )


class Layer(Structure):
    """A layer by the places of its halves, and its part of a cache."""

    _fields_ = (
        ("attention", c_void_p), ("delta_net", c_void_p), ("mlp", c_void_p), ("moe", c_void_p), ("cache", c_void_p),
        ("filled", c_void_p), ("slots", c_int64), ("conv_state", c_void_p), ("state", c_void_p), ("length", c_int64),
        ("conv_dtype", c_int32), ("unused", c_int32),
    )  # fmt: skip


STRUCTURES = (Matrix, Norm, Attention, DeltaNet, Mlp, Moe, Hidden, Cache, Rotary, Mask, Layer)
"""Those of a step, in the order in which the library counts them."""
