"""The named errors of bayesdl: what was wrong, where, and what to do about it."""

from __future__ import annotations


class BayesdlError(Exception):
    """Base of every error that bayesdl raises on purpose."""


class DataError(BayesdlError, ValueError):
    """The data cannot be used: NaN, wrong shape or dtype, empty, labels out of range, a misspelt column."""


class ModelError(BayesdlError, ValueError):
    """The model cannot be used as it is written."""


class NotFactorised(ModelError):
    """The log joint does not split into one term per row, so mini-batches and per-row likelihoods do not exist."""


class RowCoupling(NotFactorised):
    """The likelihood of a row depends on the other rows of the batch."""


class DynamicSupport(ModelError):
    """The support of a latent site depends on the value of another one."""


class RandomDensity(ModelError):
    """The log density itself draws random numbers (dropout in training mode, a sampled auxiliary)."""


class TraceMismatch(ModelError):
    """The recorded graph of a program gives other numbers than the program itself."""


class ModelRequired(BayesdlError):
    """The call needs the model's code, which a saved posterior does not contain."""


class ModelMismatch(BayesdlError, ValueError):
    """The model is not the one that the posterior, to be loaded or to be the prior, was fitted with."""


class MethodError(BayesdlError, ValueError):
    """A setting of a method is out of range, or the method does not apply to this model or data."""


class TooLarge(BayesdlError, MemoryError):
    """A result would not fit into this machine's memory; the message says what it takes."""


class Divergence(BayesdlError, RuntimeError):
    """Fitting left the finite numbers; the message says where and what to change."""


class ResumeMismatch(BayesdlError, ValueError):
    """A checkpoint belongs to another run, or to another machine set-up, than the one that tries to resume it."""


class FileError(BayesdlError, OSError):
    """A file is missing, truncated, corrupt, or not one that bayesdl wrote."""


class CertificateError(BayesdlError, ValueError):
    """A certificate cannot be given: an assumption of the theorem does not hold."""


class DataDependentPrior(CertificateError):
    """Rows of the bound were used for the prior, the scaler, or another choice made before the bound."""


class MissingExtra(BayesdlError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""
