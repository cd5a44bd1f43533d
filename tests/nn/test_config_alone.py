"""A config comes without other options, also those that have their default's value."""

from __future__ import annotations

import pytest

from regulate import RegulatorConfig, plan, regulate
from regulate.models.cifar import cifar_resnet


@pytest.mark.parametrize("call", [plan, regulate])
@pytest.mark.parametrize("options", [{"kernel": "light"}, {"cell": "gru"}, {"stages": None}, {"seed": None}], ids=str)
def test_a_config_with_other_options_is_refused(call, options):
    with pytest.raises(TypeError, match="config= holds every option, but other options were given"):
        call(cifar_resnet(14), config=RegulatorConfig("gru", kernel="dense"), **options)
