"""Attributes that are computed when first accessed, and cached."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class lazy(Generic[T]):  # noqa: N801 - used as a decorator
    """`functools.cached_property` without its lock, which Python 3.12 has dropped.

    Planning accesses about a hundred of them: the lock took a tenth of its time.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "lazy[T]": ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: Any, owner: type) -> "lazy[T] | T":
        if instance is None:
            return self
        value = self._make(instance)
        instance.__dict__[self._name] = value
        return value
