"""Which classifier and which reference judge a packaged model."""

from __future__ import annotations

import pytest

from qncd_cli.cli.options import features
from qncd_cli.metrics.domains import DOMAINS, EMOJI, FASHION, domain_of


@pytest.mark.parametrize(
    ("source", "domain"),
    [
        ("zoo:fashion-ldm", FASHION),
        ("zoo:fashion-dit", FASHION),
        ("zoo:emoji-ldm", EMOJI),
        ("zoo:landscape-ldm", None),
        ("fashion-ldm", None),
        ("models/zoo:emoji-ldm", None),
        ("random:ldm4", None),
    ],
)
def test_a_packaged_model_belongs_to_the_domain_that_its_name_begins_with(source, domain):
    assert domain_of(source) is domain


def test_no_two_domains_share_a_name_or_a_file():
    assert list(DOMAINS) == [domain.name for domain in DOMAINS.values()]
    files = [file for d in DOMAINS.values() for file in (d.weights, d.reference)]
    assert len({*files}) == len(files)


def test_network_takes_the_name_of_every_domain():
    (option,) = [o for o in features(lambda: None).__click_params__ if o.name == "network"]
    assert [name for name in option.type.choices if name in DOMAINS] == list(DOMAINS)
