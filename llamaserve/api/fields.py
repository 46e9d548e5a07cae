"""What the fields of all requests have in common: null means "not given", and a field may have several names.

Errors, and the list of what has no effect, call a field what the request calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails, PydanticCustomError


class RequestFields(BaseModel):
    """Base of requests. Fields that it does not know are kept."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    _names: ClassVar[frozenset[str]]  # all names of all fields
    _numbers: ClassVar[frozenset[str]]  # those of the fields that are numbers

    _given: Mapping[str, Any] = PrivateAttr({})
    _filled: frozenset[str] = PrivateAttr(frozenset())

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Note the names of the fields, and which are numbers."""
        cls._names = frozenset(called for name in cls.model_fields for called in names_of(cls, name))
        numbers = (name for name, field in cls.model_fields.items() if _is_number(field.annotation))
        cls._numbers = frozenset(called for name in numbers for called in names_of(cls, name))

    @model_validator(mode="wrap")
    @classmethod
    def _under_the_names_given(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, dict):
            return validate(values)
        unknown = values.keys() - cls._names if cls.model_config["extra"] == "forbid" else ()
        given = {name: value for name, value in values.items() if value is not None or name in unknown}
        if wrong := [name for name in cls._numbers & given.keys() if isinstance(given[name], bool)]:
            raise ValidationError.from_exception_data(cls.__name__, [_no_number(name, given[name]) for name in wrong])
        try:
            request = validate(given)
        except ValidationError as error:
            problems = [_renamed(cls, problem, given) for problem in error.errors()]
            raise ValidationError.from_exception_data(error.title, problems) from None
        request._given = given
        return request

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler(schema)
        _accept_more(cls, handler.resolve_ref_schema(found))
        return found

    def called(self, name: str) -> str:
        """Return what the request calls a field."""
        return _called(type(self), name, self._given)

    def changes(self, model: type[BaseModel]) -> dict[str, Any]:
        """Return the given fields of one of its bases that are not as if they had not been given."""
        return {
            name: value
            for name, field in model.model_fields.items()
            if name in self.model_fields_set and (value := getattr(self, name)) != field.default
        }

    def unusual(self, model: type[BaseModel]) -> dict[str, Any]:
        """Return the fields of one of its bases that do not have their default, given by the request or not."""
        fields = model.model_fields.items()
        return {name: value for name, field in fields if (value := getattr(self, name)) != field.default}

    def filled(self, values: Mapping[str, Any]) -> Self:
        """Return the same request with values, valid ones, for fields that it does not give. They hold, but they are
        not the request's: nobody is told when they have no effect.
        """
        added = values.keys() - self.model_fields_set
        copy = self.model_copy(update={name: values[name] for name in added})
        copy.model_fields_set.difference_update(added)
        copy._filled = self._filled | added
        return copy


class StrictFields(RequestFields):
    """Base of requests that change something as a whole, where a field that is not known is likely misspelt, even one
    that is null.
    """

    model_config = ConfigDict(extra="forbid")


ModelName = AliasChoices("model_name", "model")  # text-generation-webui's name for it, and OpenAI's


def names_of(model: type[BaseModel], name: str) -> Sequence[str]:
    """Return all names of a field, its own first."""
    field = model.model_fields.get(name)
    alias = field.validation_alias if field is not None else None
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [name]


def check_text(text: str) -> None:
    """Refuse text that is no Unicode: half of a surrogate pair can't be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair, which is no text") from None


def _checked(text: str) -> str:
    check_text(text)
    return text


def whole(value: Any) -> Any:
    """Take 3.0 for 3, as JSON schemas do, before a strict validation."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, AfterValidator(_checked)]


def _is_number(annotation: Any) -> bool:
    """Whether a field is a number, and never true or false: those would be 1 and 0 to Pydantic."""
    kinds = {annotation, *get_args(annotation)}
    return bool(kinds & {int, float}) and bool not in kinds


def _no_number(name: str, value: bool) -> InitErrorDetails:
    problem = PydanticCustomError("no_number", "must be a number, not true or false")
    return InitErrorDetails(type=problem, loc=(name,), input=value)


def _called(model: type[BaseModel], name: str, given: Mapping[str, Any]) -> str:
    return next((each for each in names_of(model, name) if each in given), name)


_WORDS = ("title", "description", "default")  # of a schema, beside what it asks for


def _accept_more(model: type[BaseModel], schema: JsonSchemaValue) -> None:
    """Have a model's JSON schema say that fields have other names, and may be null where they need not be given."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    only_one: list[JsonSchemaValue] = []
    for name in model.model_fields:
        first, *others = names_of(model, name)
        if first not in required:
            properties[first] = _or_null(properties[first])
        for other in others:
            properties[other] = _or_null(properties[first] | {"description": f"Another name of {first}."})
        if others:
            properties[first] = _or_null(properties[first])
        if others and first in required:
            required.remove(first)
            only_one.append({"oneOf": [_given(each) for each in (first, *others)]})
        elif others and model.model_config.get("extra") == "forbid":
            only_one.append({"not": _given(first, *others)})
    if only_one:
        schema["allOf"] = only_one


def _given(*names: str) -> JsonSchemaValue:
    """Return a schema that says that fields are given, which null is not."""
    return {"properties": {name: {"not": {"type": "null"}} for name in names}, "required": [*names]}


def _or_null(schema: JsonSchemaValue) -> JsonSchemaValue:
    if {"type": "null"} in schema.get("anyOf", []):
        return schema
    words = {name: value for name, value in schema.items() if name in _WORDS}
    rest = {name: value for name, value in schema.items() if name not in words}
    choices = rest["anyOf"] if [*rest] == ["anyOf"] else [rest]
    return {**words, "anyOf": [*choices, {"type": "null"}]}


def _renamed(model: type[BaseModel], problem: ErrorDetails, given: Mapping[str, Any]) -> InitErrorDetails:
    location = problem["loc"]
    if location:
        location = (_called(model, str(location[0]), given), *location[1:])
    message = PydanticCustomError(problem["type"], "{message}", {"message": problem["msg"]})
    return InitErrorDetails(type=message, loc=location, input=problem["input"])
