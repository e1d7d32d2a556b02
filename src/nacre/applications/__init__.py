"""What the layers are for: small models on real data, each on one page, and their training.

Read ``mlp``, ``cnn``, ``vit``, ``recurrent`` and ``gpt`` for the models; ``data`` and ``sources``, with ``idx``, for
what they learn from; ``recipe`` and ``training`` for how, with ``callbacks``, ``checkpoint`` and ``files`` for what is
kept of it; ``application`` for what puts these together, ``generation`` for the text that a model writes, ``command``
for ``nacre train``. Training and the digits need the packages of the ``apps`` extra; the models need torch alone.
"""

from nacre.applications.application import APPLICATIONS, Application, ApplicationSpec, build
from nacre.applications.recipe import Recipe

__all__ = ["APPLICATIONS", "Application", "ApplicationSpec", "Recipe", "build"]
