"""Graphs: what was recorded, done again at the same addresses."""

from . import memory, stream


class Graph:
    def __init__(self, *args, **kwargs):
        raise NotImplementedError(
            "currently this class cannot be initiated by the user and must "
            "be created via stream capture"
        )

    @classmethod
    def _from_stream(cls, recorded):
        graph = cls.__new__(cls)
        graph._recorded = recorded
        return graph

    def launch(self, stream=None):
        with _current(stream):
            for action, places in self._recorded:
                for place in places:
                    memory.check_inside(place, place + 1)
                action()


def _current(chosen):
    return stream.get_current_stream() if chosen is None else chosen
