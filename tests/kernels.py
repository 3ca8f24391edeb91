"""Real kernels, driven by nbclient, which sends what different front ends send."""

from __future__ import annotations

import os

import nbformat
from nbclient import NotebookClient

SETUP = """
%load_ext cachepipe
import asyncio, os, cachepipe
from cachepipe import OnlineAPI, Request
from cachepipe.testing import ScriptedModel

if "api" in globals():
    await api.close()
model = ScriptedModel(name=f"kernel{os.getpid()}", cache_scope="model")
api = OnlineAPI(model, FOLDER)

async def ask(prompt, **fields):
    [sample] = (await api.request(Request(prompt, **fields))).data
    return sample
"""


def joined(outputs):
    """Return a cell's outputs as a front end shows them: a kernel may send one stream's text in pieces."""
    whole = []
    for output in outputs:
        if whole and "text" in output and output.get("name") == whole[-1].get("name"):
            whole[-1] = nbformat.from_dict({**whole[-1], "text": whole[-1].text + output.text})
        else:
            whole.append(output)
    return whole


class Kernel:
    """A kernel that executes cells one by one.

    Args:
        folder: a short path, in which the kernel works.
        variables: variables of its environment.

    Attributes:
        reader: whether the front end has a user who may be asked for input, which nbclient has not.
    """

    def __init__(self, folder, **variables):
        self._folder, self._variables = folder, variables
        notebook = nbformat.v4.new_notebook()
        self._client = NotebookClient(notebook, kernel_name="python3", timeout=60, resources={})
        self._client.create_kernel_manager()
        self._client.km.transport = "ipc"
        self._client.km.ip = str(folder / "socket")
        self._cell_id = None
        self.reader = True

    def __enter__(self):
        own = {"IPYTHONDIR": str(self._folder / "ipython"), "PYTHONWARNINGS": "", "OPENAI_API_KEY": "none"}
        environment = {**os.environ, **own, **self._variables}
        self._client.start_new_kernel(env=environment, cwd=self._folder)
        self._client.start_new_kernel_client()
        self._client.kc.hb_channel.stop()  # it waits on a loop in a thread, which other tests forbid
        session = self._client.kc.session
        msg = session.msg

        def as_front_end(kind, content=None, **parts):
            if kind == "execute_request":
                content["allow_stdin"] = self.reader
                if self._cell_id is not None:
                    parts["metadata"] = {"cellId": self._cell_id}
            return msg(kind, content, **parts)

        session.msg = as_front_end
        return self

    def __exit__(self, *_):
        self._client.shutdown_kernel = "immediate"
        self._client._cleanup_kernel()

    def outputs(self, code, cell_id=None, *, fails=False):
        """Execute a cell and return its outputs, with what it prints to one stream as one output."""
        self._cell_id = cell_id
        cell = nbformat.v4.new_code_cell(code, metadata={"tags": ["raises-exception"] * fails})
        self._client.nb.cells.append(cell)
        self._client.execute_cell(cell, len(self._client.nb.cells) - 1)
        return joined(cell.outputs)

    def run(self, code, cell_id=None):
        """Execute a cell and return what it prints, or the text of its value."""
        outputs = self.outputs(code, cell_id)
        assert all(output.get("name") != "stderr" for output in outputs), outputs
        return "".join(output.text if "text" in output else output.data["text/plain"] for output in outputs)

    def begin(self, folder):
        """Execute a first cell, which loads the extension and makes a pipeline on a cache in a folder."""
        self.outputs(SETUP.replace("FOLDER", repr(str(folder))))

    def paid(self):
        """Return the number of samples that the pipeline's model has generated since the first cell."""
        return int(self.run("sum(call.n for call in model.calls)"))

    def leave(self):
        """Close the pipeline and unload the extension."""
        self.outputs("await api.close()\n%unload_ext cachepipe")
