"""A signal is handled after a compiled model has ended in another thread."""

from __future__ import annotations

import subprocess
import sys

import pytest

WORK = """
import signal, sys, threading, time
import openvino
from qncd_cli.backends.onnx.signal_stack import signal_stack_kept

x = openvino.opset13.parameter([-1, 4], openvino.Type.f32)
model = openvino.Model([openvino.opset13.relu(x)], [x])
with signal_stack_kept():
    held = [openvino.Core().compile_model(model, "CPU")]
thread = threading.Thread(target=held.clear)
thread.start()
thread.join()
signal.signal(signal.SIGALRM, lambda *_: print("handled"))
signal.setitimer(signal.ITIMER_REAL, 0.01)
time.sleep(0.1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is done")
@pytest.mark.parametrize("faulthandler", [[], ["-X", "faulthandler"]], ids=["none", "python's"])
def test_a_signal_is_handled_after_a_compiled_model_ended_in_another_thread(faulthandler):
    pytest.importorskip("openvino")
    command = [sys.executable, *faulthandler, "-c", WORK]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("handled", 0), done.stderr
