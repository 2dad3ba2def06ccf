"""The identity of a model, by which counts, maps and bias files are matched to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ._util.files import is_sha256
from .errors import FormatError, ModelMismatchError

# Router hash of a model that was not hashed, as in imported rankings: no model has it, so --force is needed.
UNKNOWN_ROUTER = "0" * 64

# far above any model, and low enough to bound what a forged header can allocate
MAX_LAYERS = 4096
MAX_EXPERTS = 16384


@dataclass(frozen=True)
class ModelIdentity:
    """The properties that counts, expert maps and bias files share with their model.

    `n_layer` counts the layers of the main graph (llama.cpp's `llama_model_n_layer`), dense ones included,
    multi-token-prediction layers excluded. `n_expert_used` is the router's top-k. `router_sha256` is the SHA-256 over
    these layers' `blk.*.ffn_gate_inp.weight` tensors as little-endian F32 in layer order; llama.cpp keeps them
    unquantized, so all quantizations of a model have the same.

    Raises FormatError when a field is outside its range.
    """

    architecture: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    router_sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or not self.architecture or "\0" in self.architecture:
            raise FormatError(f"architecture: {str(self.architecture)[:60]!r} is not a name")
        for name, top in (
            ("n_layer", MAX_LAYERS),
            ("n_expert", MAX_EXPERTS),
            ("n_expert_used", self.n_expert),
        ):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= top:
                raise FormatError(f"{name}: {value!r} is not a whole number from 1 to {top}")
        if not is_sha256(self.router_sha256):
            raise FormatError(f"router_sha256: {self.router_sha256!r} is not 64 lowercase hex digits")

    @property
    def shape(self) -> tuple[int, int]:
        """(n_layer, n_expert): the shape of every table of the model's experts."""
        return (self.n_layer, self.n_expert)

    @property
    def max_active(self) -> int:
        """How many experts of a layer a hard bias can promote: top-k, since no token uses more."""
        return self.n_expert_used

    @property
    def max_inactive(self) -> int:
        """How many experts of a layer a hard bias can suppress, so that the top-k that each token uses remain."""
        return self.n_expert - self.n_expert_used

    @property
    def short(self) -> str:
        """A phrase for messages: "olmoe (16 layers, 64 experts, top-8, router 3f2a91bc)"."""
        return (
            f"{self.architecture} ({self.n_layer} layers, {self.n_expert} experts, "
            f"top-{self.n_expert_used}, router {self._router})"
        )

    @property
    def _router(self) -> str:
        return "unknown" if self.router_sha256 == UNKNOWN_ROUTER else self.router_sha256[:8]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object, where: str = "model") -> ModelIdentity:
        """Rebuild an identity from `to_dict`; `where` (file and field) starts the messages.

        Raises FormatError for missing, unknown or impossible fields.
        """
        if not isinstance(data, Mapping):
            raise FormatError(f"{where}: not an object with a model's identity")
        names = set(cls.__dataclass_fields__)
        if missing := sorted(names - set(data)):
            raise FormatError(f"{where}.{missing[0]}: missing; make the file again")
        if unknown := sorted(str(key) for key in set(data) - names):
            raise FormatError(f"{where}.{unknown[0]}: unknown field; remove it")
        try:
            return cls(**data)
        except FormatError as error:
            raise FormatError(f"{where}.{error}; make the file again") from None

    def require_same(self, other: ModelIdentity, what: str, where: str, force: bool = False) -> list[str]:
        """Check that `what` (a file made for this identity) fits the model in `where`.

        Returns the warnings to print: none, or one when `force` permitted another router. Another architecture or
        shape, whose layers and experts do not correspond, is never permitted.

        Raises ModelMismatchError.
        """
        if self == other:
            return []
        same_shape = (
            self.architecture == other.architecture
            and self.shape == other.shape
            and self.n_expert_used == other.n_expert_used
        )
        if same_shape:
            found = f"its router is {other._router}"
            if force:
                return [
                    f"{what}: made for {self.short}, and {where} has its shape, but {found}; used because it was forced"
                ]
            if self.router_sha256 == UNKNOWN_ROUTER:
                raise ModelMismatchError(
                    f"{what}: made for {self.short}, so it cannot be checked whether it is for {where}; if you know "
                    "that it is, add --force, or import the map again with -m"
                )
            message = f"{what}: made for {self.short}, but {where} is another {other.short}"
        else:
            message = f"{what}: made for {self.short}, but {where} is {other.short}"
        raise ModelMismatchError(f"{message}; run steermoe detect on this model")
