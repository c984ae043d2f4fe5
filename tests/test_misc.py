"""torch_utils.misc: saving tensors."""

from __future__ import annotations

import io
import os
import signal

import pytest
import torch

from torch_utils.misc import load_tensors, save_tensors


def test_control_c_waits_for_a_file_being_saved():
    """An exception amid torch.save's C++ part would abort the process ('terminate called ...')."""

    class File(io.BytesIO):
        def write(self, data):
            if not done:
                done.append(os.kill(os.getpid(), signal.SIGINT))
            return super().write(data)

    done = []
    file = File()
    with pytest.raises(KeyboardInterrupt):
        save_tensors({"x": torch.arange(1000.0)}, file)
    assert done and torch.equal(load_tensors(io.BytesIO(file.getvalue()))["x"], torch.arange(1000.0))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
