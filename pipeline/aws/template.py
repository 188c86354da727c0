"""The CloudFormation template as it is deployed: with the flows in it, and what its parameters may be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from spaceport_gs.errors import InputError

FOLDER = Path(__file__).parent
KEPT = {
    "Bucket": "BucketName",
    "Key": "KeyId",
    "SfmRepository": "RepositoryName",
    "TrainRepository": "RepositoryName",
    "CompressRepository": "RepositoryName",
}
"""Resources that outlive the stack, and the property that tells one from others."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Knows CloudFormation's short forms, such as !Ref."""


def _short_form(loader: Any, name: str, node: Any) -> dict[str, Any]:
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
        value = value.split(".", 1) if name == "GetAtt" else value
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = loader.construct_mapping(node, deep=True)
    return {name if name in ("Ref", "Condition") else f"Fn::{name}": value}


_Loader.add_multi_constructor("!", _short_form)


@cache
def template() -> Mapping[str, Any]:
    """As CloudFormation takes it: short forms written out, and the definitions of the state machines in it."""
    loaded = yaml.load((FOLDER / "template.yaml").read_text(encoding="utf-8"), _Loader)
    for resource in loaded["Resources"].values():
        if resource["Type"] == "AWS::StepFunctions::StateMachine":
            properties = resource["Properties"]
            definition = json.loads((FOLDER / properties["DefinitionString"]).read_text(encoding="utf-8"))
            properties["DefinitionString"] = _compact(definition)
    return dict(loaded)


def render(names: Mapping[str, str], parameters: Mapping[str, str]) -> str:
    """`template` as JSON, the kept resources under names written out: CloudFormation is not sure of one that it has to work out,
    and warns that what bears it might be replaced. A budget is in it only if there is one: not every region knows the type.
    """
    resources = {
        key: {**resource, "Properties": {**resource["Properties"], KEPT[key]: names[key]}} if key in names else resource
        for key, resource in template()["Resources"].items()
        if key != "Budget" or parameters.get("MonthlyBudget", "0") != "0"
    }
    return _compact({**template(), "Resources": resources})


def names_of(prefix: str, account_id: str, region: str) -> dict[str, str]:
    """Of the kept resources that have any."""
    values = {"Prefix": prefix, "AWS::AccountId": account_id, "AWS::Region": region}
    return {
        key: re.sub(
            r"\$\{(.+?)\}", lambda found: values[found[1]], template()["Resources"][key]["Properties"][name]["Fn::Sub"]
        )
        for key, name in KEPT.items()
        if key != "Key"
    }


def skeleton(identifiers: Mapping[str, str]) -> str:
    """A template of nothing but these kept resources, by logical id: an import may neither add nor change anything."""
    resources = {
        name: {
            "Type": template()["Resources"][name]["Type"],
            "DeletionPolicy": "Retain",
            "UpdateReplacePolicy": "Retain",
            "Properties": {} if name == "Key" else {KEPT[name]: identifier},
        }
        for name, identifier in identifiers.items()
    }
    return _compact({"Description": template()["Description"], "Resources": resources})


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def check(parameters: Mapping[str, str]) -> None:
    """InputError unless the template takes these."""
    known = template()["Parameters"]
    for name, value in parameters.items():
        if name not in known:
            raise InputError(f"{name}: no such parameter of the stack; there are {', '.join(known)}")
        if wrong := _wrong(known[name], value):
            raise InputError(f"{name} {value!r}: {wrong}. {known[name].get('Description', '')}".strip())
    if (key := parameters.get("PublicKey", "").strip()) and not key.startswith("-----BEGIN PUBLIC KEY-----"):
        raise InputError(
            "PublicKey: expected the public one of a pair of RSA keys in PEM; keep the private one to yourself"
        )
    if parameters.get("Publishing") == "signed" and not parameters.get("PublicKey"):
        raise InputError("Publishing signed: give PublicKey, the public one of a pair of RSA keys in PEM")


def _wrong(parameter: Mapping[str, Any], value: str) -> str:
    """Why a parameter cannot have this value; empty: it can."""
    if "AllowedPattern" in parameter and not re.fullmatch(parameter["AllowedPattern"], value):
        return str(parameter.get("ConstraintDescription", f"does not look like {parameter['AllowedPattern']}"))
    if parameter["Type"] == "Number":
        if not re.fullmatch(r"\d{1,9}", value):
            return "expected a whole number"
        least, most = parameter.get("MinValue", 0), parameter.get("MaxValue", 10**9)
        if not least <= int(value) <= most:
            return f"expected {least} to {most}"
    allowed = [str(choice) for choice in parameter.get("AllowedValues", [])]
    return f"choose {', '.join(allowed)}" if allowed and value not in allowed else ""
