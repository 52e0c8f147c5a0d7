"""Bayesian networks as scikit-learn estimators: ``fit``, ``predict``, ``predict_proba``, ``score``.

Both are thin: they size a network with ``models.mlp``, fit it with any method, and translate arrays. The posterior
stays at hand as ``posterior_`` for everything that scikit-learn's interface has no word for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_array, check_random_state, check_X_y
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from bayesdl._registry import method_class
from bayesdl.data import Dataset
from bayesdl.errors import DataError
from bayesdl.infer.method import Method
from bayesdl.models import mlp
from bayesdl.posterior import Posterior, Prediction


class _Network(BaseEstimator):
    """What the two estimators share: the settings, the fit, and the prediction for new rows."""

    posterior_: Posterior
    n_features_in_: int

    def __init__(
        self,
        method: str | Method = "meanfieldvi",
        hidden: Sequence[int] = (16,),
        activation: str = "tanh",
        prior: Any = None,
        likelihood: Any = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.method = method
        self.hidden = hidden
        self.activation = activation
        self.prior = prior
        self.likelihood = likelihood
        self.random_state = random_state

    def _fit(self, data: Dataset) -> None:
        method = method_class(self.method)() if isinstance(self.method, str) else self.method
        model = mlp(
            data, hidden=tuple(self.hidden), activation=self.activation, prior=self.prior, likelihood=self.likelihood
        )
        state = self.random_state
        seed = int(state) if isinstance(state, int | np.integer) else check_random_state(state).randint(2**31 - 1)
        self.posterior_ = method.fit(model, data, seed=seed)
        self.n_features_in_ = data.x.shape[1]

    def _predict(self, X: ArrayLike) -> Prediction:
        check_is_fitted(self, "posterior_")
        x = check_array(X, dtype=np.float64)
        if x.shape[1] != self.n_features_in_:
            raise DataError(
                f"X has {x.shape[1]} features, but {type(self).__name__} was fitted on {self.n_features_in_}; "
                "pass the same columns in the same order."
            )
        return self.posterior_.predict(torch.from_numpy(np.ascontiguousarray(x)))


class BayesianRegressor(RegressorMixin, _Network):
    """Bayesian regression with a fully connected network.

    Args:
        method: a method's name in any case ("nuts") or a method with its settings (``NUTS(chains=2)``).
        hidden: units of each hidden layer.
        activation: as in ``models.mlp``.
        prior: as in ``BayesianNetwork``; None is its default.
        likelihood: as in ``BayesianNetwork``; None is Gaussian noise with a prior.
        random_state: an integer is the fit's seed; otherwise a seed is drawn from the given or the global state.

    Attributes:
        posterior_: the fitted posterior.
        n_features_in_: columns of X.

    Example:
        >>> model = BayesianRegressor("nuts", hidden=(16,), random_state=0).fit(X, y)
        >>> mean, sd = model.predict(X_new, return_std=True)
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit the network.

        Args:
            X: ``[N, D]`` in raw units; scaling is done inside.
            y: ``[N]`` in raw units.

        Returns:
            The estimator itself.
        """
        x, target = check_X_y(X, y, dtype=np.float64, y_numeric=True)
        self._fit(Dataset.from_arrays(x, target.astype(np.float64), task="regression"))
        return self

    @overload
    def predict(self, X: ArrayLike, return_std: Literal[False] = False) -> NDArray[np.float64]: ...
    @overload
    def predict(self, X: ArrayLike, return_std: Literal[True]) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
    def predict(self, X: ArrayLike, return_std: bool = False) -> Any:
        """The predictive mean, and on request the predictive standard deviation (epistemic and aleatoric).

        Args:
            X: ``[N, D]``.
            return_std: whether to return the standard deviation too.

        Returns:
            ``[N]``, or a pair of them, in y's units.
        """
        prediction = self._predict(X)
        mean = prediction.mean.double().numpy()
        return (mean, prediction.sd.double().numpy()) if return_std else mean


class BayesianClassifier(ClassifierMixin, _Network):
    """Bayesian classification with a fully connected network.

    Args:
        method: a method's name in any case ("nuts") or a method with its settings (``NUTS(chains=2)``).
        hidden: units of each hidden layer.
        activation: as in ``models.mlp``.
        prior: as in ``BayesianNetwork``; None is its default.
        likelihood: as in ``BayesianNetwork``; None is Bernoulli for two classes, Categorical for more.
        random_state: an integer is the fit's seed; otherwise a seed is drawn from the given or the global state.

    Attributes:
        classes_: the labels, sorted, as they were given.
        posterior_: the fitted posterior; its classes are positions in ``classes_``.
        n_features_in_: columns of X.

    Example:
        >>> model = BayesianClassifier("meanfieldvi", random_state=0).fit(X, y)
        >>> model.predict_proba(X_new)
    """

    classes_: NDArray[Any]

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit the network.

        Args:
            X: ``[N, D]`` in raw units; scaling is done inside.
            y: ``[N]`` labels of any kind.

        Returns:
            The estimator itself.
        """
        x, labels = check_X_y(X, y, dtype=np.float64)
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        self._fit(Dataset.from_arrays(x, codes.astype(np.int64), task="classification"))
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Class probabilities, averaged over the posterior.

        Args:
            X: ``[N, D]``.

        Returns:
            ``[N, K]``, columns in the order of ``classes_``.
        """
        probs: NDArray[np.float64] = self._predict(X).probs.double().numpy()
        return probs

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable label of each row.

        Args:
            X: ``[N, D]``.

        Returns:
            ``[N]``, labels as they were given to ``fit``.
        """
        predicted: NDArray[Any] = self.classes_[self.predict_proba(X).argmax(1)]
        return predicted
