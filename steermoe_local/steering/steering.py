"""Steering: a choice of experts from an expert map, or a ready bias file, and the bias that is built from it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from .._util.files import StrPath, is_sha256
from ..errors import FormatError, UsageError
from ..identity import ModelIdentity
from ..maps.expert_map import ExpertMap, parse_layers
from ..maps.ranks import RANKS, relative_sizes
from ..maps.recommended import Recommended, Values, fitted_values, require_in_table
from .bias_file import DEFAULT_EPSILON, BiasFile, none_if_empty, read_bias
from .fitted_values import fitted_bias, require_no_choice
from .old_digests import chat_digest
from .presets import Preset, check_sides, preset_for, presets_for
from .rules import Rule, json_cap

# The fields that choose experts of a map and the rule, with their types in JSON; in a bias file the choice is made.
_CHOICE: dict[str, tuple[type, ...]] = {
    "activate": (int,),
    "deactivate": (int,),
    "reverse": (bool,),
    "layers": (str, NoneType),
    "scale": (int, float, NoneType),
    "epsilon": (int, float),
    "preset": (str, NoneType),
    "preset_model": (str, NoneType),
}
# Fields that came later: written only where they are not the default, so that files stay as they were.
_FURTHER: dict[str, tuple[type, ...]] = {
    "rank": (str,),
    "weights": (str, NoneType),
    "cap": (int, float, NoneType),
}
_KNOWN = _CHOICE | _FURTHER
# What chooses experts in place of a recommended choice, and what takes fitted values away.
_NUMBERS = {"activate", "deactivate", "preset"}
_NO_VALUES = {"values": (), "scale": None}


@dataclass(frozen=True, eq=False)
class Steering:
    """A choice of experts from a map and a rule, or a ready bias file. Immutable; `changed` makes another.

    `name` is shown to users. `activate` and `deactivate` are numbers of experts, `layers` is written like "3-7,9"
    (None: all), `reverse` flips the sign of the scores first, `rank` names the score by which experts are chosen
    (`ExpertMap.choose`). With `scale` and `cap` None the rule is hard, with `epsilon`. `scale` makes it soft: the
    logits that promoted experts gain and suppressed ones lose; with `weights` (`ranks.WEIGHTS`) each expert in
    proportion to the size of that score, the largest of the chosen ones in full. `cap` makes the rule capped: hard,
    but no logit moves by more than these (`inf`: the hard rule). `values` are fitted logits of some experts
    (`Recommended.values`) in place of a choice: `scale` multiplies them, `reverse` negates them. `preset` and
    `preset_model` are set if the numbers are the paper's. `path` is the file of the map or bias, if it has one.

    Raises UsageError for a map together with a bias file, for a choice on a bias file, for values of two rules, for
    fitted values with a choice of experts, and for a preset that is reversed, by another rank than RD, weighted or
    capped: the paper's numbers are of its own choice.
    """

    name: str
    expert_map: ExpertMap | None = None
    bias: BiasFile | None = None
    activate: int = 0
    deactivate: int = 0
    reverse: bool = False
    layers: str | None = None
    scale: float | None = None
    epsilon: float = DEFAULT_EPSILON
    preset: str | None = None
    preset_model: str | None = None
    path: Path | None = None
    rank: str = "rd"
    weights: str | None = None
    cap: float | None = None
    values: Values = ()

    def __post_init__(self) -> None:
        """Check that the fields go together; numbers and layers are checked against the model by `build`."""
        if self.path is not None:
            object.__setattr__(self, "path", Path(self.path))
        if self.bias is not None:
            if self.expert_map is not None:
                raise UsageError(f"{self.name}: a bias file and a map both steer; give one of them")
            fields = self.__dataclass_fields__
            if changed := [name for name in _KNOWN if getattr(self, name) != fields[name].default]:
                raise UsageError(
                    f"{changed[0]}: {self.name} is a bias file, whose choice of experts is made; "
                    "give the map that it was built from (--map MAP) to change it"
                )
        if self.rank not in RANKS:
            raise UsageError(f"rank: {self.rank!r} is none of {', '.join(RANKS)}")
        _ = self.rule
        if self.values:
            self._check_values()
        if self.preset and self.further:
            name, value = next(iter(self.further.items()))
            raise UsageError(
                f"preset {self.preset}: the paper's numbers of experts are those of RD and its own rule, not of {name} "
                f"{value}; give numbers of your own"
            )
        if self.preset and self.reverse:
            raise UsageError(
                f"preset {self.preset}: never steers away from its behaviour; give numbers of experts of your own "
                "to reverse the map"
            )

    def _check_values(self) -> None:
        """Bring fitted values into their final form. Raises UsageError for a choice beside them, FormatError."""
        if self.expert_map is None:
            raise UsageError(f"{self.name}: fitted values are a map's; give the map")
        object.__setattr__(self, "values", fitted_values(self.values, "values"))
        require_in_table(self.values, self.expert_map.identity.shape, "values")
        require_no_choice(self.path or self.name, vars(self))

    @classmethod
    def open(
        cls,
        *,
        map_file: StrPath | None = None,
        bias: StrPath | None = None,
        name: str | None = None,
        **choice: Any,
    ) -> Steering:
        """Read a map or a bias file; `choice` are fields of Steering. `name` defaults to the behaviour or file stem.

        Raises FormatError, UsageError (both or no file).
        """
        if (map_file is None) == (bias is None):
            raise UsageError("steering needs a map or a bias file, and not both")
        if map_file is not None:
            path = Path(map_file)
            expert_map = ExpertMap.load(path)
            return cls(name or expert_map.behaviour or path.stem, expert_map=expert_map, path=path, **choice)
        path = Path(os.fspath(bias))  # type: ignore[arg-type]  # one of the two is given
        return cls(name or path.stem, bias=read_bias(path), path=path, **choice)

    @property
    def source_sha256(self) -> str | None:
        """Digest of the map, or of what the bias file steers (`BiasFile.key`), in hex; None if there is neither."""
        if self.expert_map is not None:
            return self.expert_map.sha256
        return None if self.bias is None else self.bias.key

    def with_preset(self, preset: str) -> tuple[Steering, list[str]]:
        """The same with the paper's numbers of experts for the map's model, and warnings of `presets.check_sides`.

        Raises UsageError when the paper has no numbers for the model, the map's sides are the other way round, or this
        is a bias file.
        """
        if self.expert_map is None:
            raise UsageError(f"preset {preset}: {self.name} is no map; give one with --map MAP")
        numbers = preset_for(preset, self.expert_map.identity)
        warnings = check_sides(preset, *self._sides, str(self.path or self.name))
        changed = dataclasses.replace(
            self,
            activate=numbers.n_activate,
            deactivate=numbers.n_deactivate,
            preset=preset,
            preset_model=numbers.model,
        )
        return changed, warnings

    def with_choice(self, choice: Mapping[str, Any], *, strength: float | None = None) -> tuple[Steering, list[str]]:
        """The same with what a rule of a plan or a request chooses, and warnings of `presets.check_sides`.

        `choice` has some of activate, deactivate, reverse, layers, preset, rank, mode, scale, weights and cap; None is
        as if it was left out. `strength` is that of a soft rule without a scale; None: it has to be given.

        Raises UsageError, also for any choice on a bias file.
        """
        given = {name: value for name, value in choice.items() if value is not None}
        if given and self.expert_map is None:
            raise UsageError(
                f"{self.name}: a bias file, whose choice of experts is made; only a map takes other numbers"
            )
        named = ("activate", "deactivate", "reverse", "layers", "rank")
        changes = {name: given[name] for name in named if name in given}
        if self.values and _NUMBERS & given.keys():
            return self.changed(**_NO_VALUES).with_choice(choice, strength=strength)
        rule, preset = self.rule, given.get("preset")
        if preset is not None:  # the paper's choice, whatever it was before
            if fixed := [name for name in ("activate", "deactivate", "reverse") if given.get(name)]:
                raise UsageError(f"preset {preset} gives the numbers and the side; leave out {fixed[0]}, or preset")
            changes |= {"reverse": False, "rank": "rd"}
            rule = Rule(scale=rule.scale)
        cap = float(given["cap"]) if "cap" in given else None
        changes |= rule.changed(
            given.get("mode"), given.get("scale"), cap, given.get("weights"), strength=strength
        ).fields
        changed = self.changed(**changes)
        return (changed, []) if preset is None else changed.with_preset(preset)

    @property
    def recommended(self) -> Recommended | None:
        """The choice that the map recommends; None without one, and for a bias file."""
        return None if self.expert_map is None else self.expert_map.recommended

    @property
    def has_experts(self) -> bool:
        """Whether experts are chosen, by numbers or by fitted values, or a bias file steers."""
        return self.bias is not None or bool(self.activate or self.deactivate or self.values)

    def recommending(self, choice: Mapping[str, Any] | None = None) -> Steering:
        """The same with all of the map's recommended choice, where neither this nor `choice` has numbers of experts.

        `choice` is what is asked for beside it, as in `with_choice`, which may change it further: numbers, or a preset,
        are instead of a recommended choice. Without one the steering stays as it is. Recommended values are a soft rule
        of strength 1.

        Raises UsageError where `choice` asks for the other side of a choice that is of one side alone.
        """
        given = {name: value for name, value in (choice or {}).items() if value is not None}
        recommended = self.recommended
        if recommended is None or self.has_experts or self.preset or _NUMBERS & given.keys():
            return self
        self._require_recommended_side(given)
        if recommended.values:
            reverse = bool(recommended.choice.get("reverse"))
            return dataclasses.replace(self, values=recommended.values, reverse=reverse, scale=1.0)
        return self.with_choice(recommended.choice)[0]

    def _require_recommended_side(self, choice: Mapping[str, Any]) -> None:
        """Raise UsageError where `choice` takes the other side of a recommended choice that is of one side alone."""
        recommended = self.recommended
        if recommended is None or not recommended.one_way or _NUMBERS & choice.keys():
            return
        side = recommended.choice.get("reverse", False)
        numbers = [getattr(self, name) for name in ("activate", "deactivate")]
        own = any(numbers) and numbers != [recommended.choice.get(name, 0) for name in ("activate", "deactivate")]
        if choice.get("reverse", side) != side and not own:
            name = dataclasses.replace(self, reverse=side).side or "one side"
            raise UsageError(
                f"{self.path or self.name}: recommends steering to {name} alone; give numbers of experts of your own "
                "for the other side"
            )

    @property
    def presets(self) -> list[Preset]:
        """The presets that fit the map; none for a bias file."""
        return [] if self.expert_map is None else presets_for(self.expert_map.identity, *self._sides)

    @property
    def _sides(self) -> tuple[str, str, str]:
        assert self.expert_map is not None
        return self.expert_map.behaviour, self.expert_map.positive, self.expert_map.negative

    @property
    def identity(self) -> ModelIdentity | None:
        """The model that the map or bias was made for; None without either."""
        made = self.expert_map or self.bias
        return None if made is None else made.identity

    @property
    def mode(self) -> str:
        """The rule: hard, soft or capped."""
        if self.bias is not None:
            return self.bias.mode
        return self.rule.name

    @property
    def rule(self) -> Rule:
        """The rule by which the experts of a map are steered."""
        return Rule(self.scale, self.weights, self.cap)

    @property
    def side(self) -> str:
        """Name of the side that is steered towards; "" for a bias file or a map without names."""
        if self.expert_map is None:
            return ""
        return self.expert_map.negative if self.reverse else self.expert_map.positive

    def check(self, identity: ModelIdentity, where: str, force: bool = False) -> list[str]:
        """Check that the map or bias was made for the model `identity`, whose file is `where`.

        Returns warnings, as `ModelIdentity.require_same`. Raises ModelMismatchError.
        """
        own = self.identity
        return [] if own is None else own.require_same(identity, str(self.path or self.name), where, force)

    def build(self, identity: ModelIdentity | None = None) -> BiasFile | None:
        """The bias that steers by this choice; None, "unsteered", when it changes nothing.

        It is made for `identity`, by default the map's; see `check`.

        Raises ChoiceError, UsageError, FormatError for what the model cannot carry out.
        """
        return none_if_empty(self.bias_file(identity))

    def bias_file(self, identity: ModelIdentity | None = None) -> BiasFile | None:
        """The bias as `build` makes it, to write or describe: one that changes nothing comes with its provenance.

        A ready bias file is returned as it is. None when no experts are asked for. Raises as `build`.
        """
        if self.bias is not None or self.expert_map is None:
            return self.bias
        if not self.has_experts:
            return None
        identity = identity or self.expert_map.identity
        provenance = {
            "behaviour": self.expert_map.behaviour,
            "map_sha256": self.expert_map.sha256,
            "choice": json.dumps(self.choice),
            "tool": self.expert_map.tool,
        }
        if self.values:
            return fitted_bias(self.values, identity, self.scale or 0.0, self.reverse, provenance)
        layers = None if self.layers is None else parse_layers(self.layers)
        signs = self.expert_map.choose(
            self.activate, self.deactivate, reverse=self.reverse, layers=layers, rank=self.rank
        )
        if self.cap is not None:
            return BiasFile.from_capped(signs, identity, self.cap, self.epsilon, provenance)
        if self.scale is not None:
            sizes = 1 if self.weights is None else relative_sizes(self.expert_map, self.weights, signs)
            return BiasFile.from_soft(signs * sizes, identity, self.scale, provenance)
        return BiasFile.from_signs(signs, identity, self.epsilon, provenance)

    @property
    def choice(self) -> dict[str, Any]:
        """The choice as written into the provenance of a bias file; of fitted values how many there are."""
        choice: dict[str, Any] = {name: getattr(self, name) for name in ("activate", "deactivate", "reverse", "layers")}
        if self.preset:
            choice |= {"preset": self.preset, "preset_model": self.preset_model}
        if self.scale is not None:
            choice["scale"] = self.scale
        return choice | self.further | ({"fitted": len(self.values)} if self.values else {})

    @property
    def content(self) -> tuple[Any, ...]:
        """Equal for steerings that build equal biases for one model."""
        if self.expert_map is None:
            return (None if self.bias is None else self.bias.key,)
        names = ("activate", "deactivate", "reverse", "layers", "rank", "weights")
        reals = (self.epsilon, self.scale, self.cap)  # 3 and 3.0 are one number, and are to be written as one
        return (
            self.expert_map.sha256,
            *(getattr(self, name) for name in names),
            *(None if real is None else float(real) for real in reals),
            self.values,
        )

    @property
    def further(self) -> dict[str, Any]:
        """Rank, weights and cap as JSON values, those that are not the default."""
        known = {"rank": self.rank, "weights": self.weights, "cap": json_cap(self.cap)}
        fields = self.__dataclass_fields__
        return {name: value for name, value in known.items() if value != fields[name].default}

    @property
    def shortfall(self) -> str:
        """A sentence if fewer experts have a significant effect than are asked for; "" otherwise. Raises as `build`."""
        if self.expert_map is None or self.rank not in ("effect", "efficiency"):
            return ""
        layers = None if self.layers is None else parse_layers(self.layers)
        there = self.expert_map.n_worth(reverse=self.reverse, layers=layers, rank=self.rank)
        asked = {"promote": (self.activate, there[0]), "suppress": (self.deactivate, there[1])}
        words = [f"{n} to {action} ({wanted} asked for)" for action, (wanted, n) in asked.items() if n < wanted]
        return f"{self.name}: too few experts with a significant effect: {', '.join(words)}" if words else ""

    def changed(self, **fields: Any) -> Steering:
        """A copy with other fields. With other numbers of experts it is no preset any more, and fitted values are
        left with the hard rule, unless `fields` have another one.

        Raises UsageError for a bias file, whose choice cannot be changed, and for an unknown field.
        """
        if unknown := sorted(set(fields) - set(self.__dataclass_fields__)):
            raise UsageError(f"{unknown[0]}: not a part of steering; change one of {', '.join(_KNOWN)}")
        self._require_recommended_side(fields)
        if {"activate", "deactivate"} & fields.keys() and "preset" not in fields:
            fields |= {"preset": None, "preset_model": None}
            if self.values and not fields.get("values"):
                fields = {**_NO_VALUES, **fields}
        return dataclasses.replace(self, **fields)

    def to_dict(self) -> dict[str, Any]:
        """The choice as plain JSON values: file and digest, numbers, rule, and how many experts are steered.

        `map_sha256` is `ExpertMap.sha256`, `bias_digest` is `BiasFile.key`. Raises as `build`.
        """
        built, bias, expert_map = self.build(), self.bias, self.expert_map
        counts = {"n_active": built.n_active if built else 0, "n_inactive": built.n_inactive if built else 0}
        path = None if self.path is None else str(self.path)
        if expert_map is None:
            source = {"bias": path, "bias_digest": None if bias is None else bias.key, "mode": self.mode}
            provenance = {} if bias is None else {"provenance": dict(bias.provenance)}
            return {"name": self.name, **source, **counts, **provenance}
        return {
            "name": self.name,
            "map": path,
            "map_sha256": expert_map.sha256,
            "behaviour": expert_map.behaviour,
            "side": self.side,
            "mode": self.mode,
            **{name: getattr(self, name) for name in _CHOICE},
            **self.further,
            **({"values": [list(row) for row in self.values]} if self.values else {}),
            **counts,
        }

    @classmethod
    def from_dict(cls, data: object, where: str = "steering") -> Steering:
        """Open the file that `to_dict` describes and take its choice; the digest must be that of the file.

        `where` starts the messages. Raises FormatError, also for a file that is missing or has changed.
        """
        if not isinstance(data, Mapping):
            raise FormatError(f"{where}: not an object with a choice of steering")
        kind = "map" if "map" in data else "bias"
        digest_field = "map_sha256" if kind == "map" else "bias_digest"
        name, path, digest = (data.get(key) for key in ("name", kind, digest_field))
        if not isinstance(name, str) or not is_sha256(digest):
            raise FormatError(f"{where}: name or {digest_field} missing or damaged; choose the steering again")
        if not isinstance(path, str) or "\0" in path:
            raise FormatError(f"{where}.{kind}: {name!r} did not come from a file; choose the steering again")
        if not Path(path).is_file():
            raise FormatError(f"{where}.{kind}: {path}: no such file; bring it back or choose another steering")
        choice = {key: data[key] for key in _KNOWN if key in data} if kind == "map" else {}
        if choice.get("cap") == "inf":  # as JSON has it
            choice["cap"] = math.inf
        for key, value in choice.items():
            if type(value) not in _KNOWN[key] or (_KNOWN[key] == (int,) and value < 0):
                raise FormatError(f"{where}.{key}: {value!r} is not what stands there; choose the steering again")
        if kind == "map" and "values" in data:
            choice["values"] = fitted_values(data["values"], f"{where}.values")
        try:
            opened = cls.open(name=name, **{"map_file" if kind == "map" else "bias": path}, **choice)
        except UsageError as error:
            raise FormatError(f"{where}: {error}") from None
        known = [made.sha256] if (made := opened.expert_map) else []
        known += [opened.bias.key, chat_digest(opened.bias)] if opened.bias else []
        if digest not in known:
            raise FormatError(
                f"{where}.{kind}: {path}: not the file that it was ({known[0][:8]}, then {str(digest)[:8]}); "
                "bring the old one back or choose the steering again"
            )
        return opened
