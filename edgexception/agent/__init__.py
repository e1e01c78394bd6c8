"""The agent: the small program that meets a runtime, on this machine or on a device.

`python -m edgexception.agent VERB REQUEST_DIR RESPONSE_DIR` with the verbs `probe`, `build` and
`run`; `protocol.py` says what goes in and out. It needs the standard library, the runtime itself
and, but for trtexec, numpy (Python >= 3.10), and nothing else of edgexception, so that it can be
copied to a device as one zipapp. It computes no percentile and no accuracy: the host does, from raw
data.
"""
