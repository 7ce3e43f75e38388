"""Parts of composed students, made once for all their tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers
from students.composing import Parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    transformers.utils.logging.disable_progress_bar()
    yield Parts(tmp_path_factory.mktemp("parts"))
    transformers.utils.logging.enable_progress_bar()
