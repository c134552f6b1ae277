"""Every error a user can cause, one type per kind. The message says what, where, the value, what is allowed, what to do."""

from __future__ import annotations


class KappaquantError(Exception):
    """Base of all errors that are the input's fault; the command line turns it into one line and exit code 2."""


class FormatError(KappaquantError):
    """A quantized checkpoint is malformed, incomplete, tampered with, or of an unknown version."""


class SourceError(KappaquantError):
    """A source checkpoint cannot be read: broken safetensors, missing shard, bad index, pickle-only."""


class AlreadyQuantizedError(SourceError):
    """The source's weights are already quantized by another method."""


class NonFiniteError(SourceError):
    """A weight holds NaN or infinity, or is too large for the format's float16 norms."""


class PlanError(KappaquantError):
    """A plan is invalid: bits or group out of range, unknown tensors, tensors left out."""


class BudgetError(PlanError):
    """No plan keeps to a budget of bytes, or every plan does; the message says the smallest and the largest."""


class OutputError(KappaquantError):
    """The output folder cannot be used or the disk is full."""


class PublishError(KappaquantError):
    """A checkpoint is not fit to be published as it is, or the Hub refused it or could not be reached."""


class UnsupportedError(KappaquantError):
    """No kernel, architecture or option fits the request; the message lists every reason."""


class WorkerError(KappaquantError):
    """A worker process was ended from outside, most often for want of memory."""


class RegistrationError(KappaquantError):
    """An extension, such as an architecture, contradicts itself, or what is registered under its name already."""
