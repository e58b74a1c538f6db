"""The ``scao_*`` options of an Axolotl config, built from SCAO's own table, and where its rules are applied."""

from __future__ import annotations

from typing import Any, Literal

from axolotl.utils.logging import get_logger
from pydantic import BaseModel, Field, ModelWrapValidatorHandler, ValidationError, create_model, model_validator

from axolotl_plugin.rules import check_config, check_sizes
from axolotl_plugin.values import PREFIX, Findings, read_raw
from scao_hf.options import OPTIONS, SWITCHES

LOG = get_logger(__name__)


class SCAOConfigRules(BaseModel):
    """The validation of ``optimizer: scao``: everything that is wrong is collected and raised once."""

    @model_validator(mode="wrap")
    @classmethod
    def scao_check_config(cls, data: Any, handler: ModelWrapValidatorHandler[SCAOConfigRules]) -> SCAOConfigRules:
        """Read the raw keys, let Axolotl validate and normalise, then apply the rules to the result.

        Raises:
            ValueError: all errors together, Axolotl's own included where the config has both.
        """
        if not isinstance(data, dict):
            return handler(data)
        findings = Findings()
        data = read_raw(data, findings)
        if data.get("merge_lora") or data.get("inference"):
            return handler(data)  # nothing is trained, and merging reloads the config with other settings
        if data.get("optimizer") == "scao":
            check_sizes(data.get, findings)
        try:
            config = handler(data)
        except ValidationError as error:
            if findings.errors:
                for part in error.errors():
                    findings.errors.append(f"{'.'.join(map(str, part['loc']))} {part['msg']}".strip())
                findings.report(LOG)
            raise
        # What was passed and nothing else: a release of Axolotl may come to have fields of these names, with defaults.
        vars(config).update({key: data.get(key) for key in _FIELDS})
        check_config(vars(config).get, findings)  # not getattr: it warns about fields that Axolotl has deprecated
        findings.report(LOG)
        return config


def _field(name: str) -> tuple[Any, Any]:
    option = OPTIONS[name]
    kind: Any = Literal[option.choices] if option.choices else option.kind
    description = f"SCAO: {option.doc}; {option.valid}. Unset: the rule's default"
    return kind | None, Field(default=None, description=description)


_FIELDS: dict[str, Any] = {PREFIX + name: _field(name) for name in OPTIONS}
for _name, _option in SWITCHES.items():
    _FIELDS[PREFIX + _name] = (_option.kind | None, Field(default=None, description=f"{_option.doc}; {_option.valid}"))

SCAOArgs = create_model("SCAOArgs", __base__=SCAOConfigRules, __module__=__name__, **_FIELDS)
SCAOArgs.__doc__ = "The flat, optional ``scao_*`` fields of an Axolotl config; None means not passed."
