"""Drives one VM with the Python package qemu.qmp, as management scripts do: python3 qemu_qmp.py SOCKET IMAGE.

SOCKET is the VM's QMP socket, IMAGE a disk image that the VMM can open. Ends with status 0 when all was as it should be.
"""

import asyncio
import os
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient

LIMIT = 30


async def event(listener, name):
    """The next event, which must have this name."""
    message = await asyncio.wait_for(listener.get(), LIMIT)
    assert message["event"] == name, f"expected {name}, got {message}"
    return message["data"]


async def main(socket, image):
    qmp = QMPClient("test")
    listener = EventListener()
    qmp.register_listener(listener)
    # Greeting and capabilities.
    await asyncio.wait_for(qmp.connect(socket), LIMIT)
    status = await qmp.execute("query-status")
    assert status["running"] is True and status["status"] == "running", status

    for command, name, running in [("stop", "STOP", False), ("cont", "RESUME", True)]:
        assert await qmp.execute(command) == {}
        await event(listener, name)
        status = await qmp.execute("query-status")
        assert status["running"] is running, status
        try:
            await qmp.execute(command)
            raise AssertionError(f"a second {command} is no error")
        except ExecuteError as error:
            assert error.error_class == "GenericError", error

    file = {"driver": "file", "filename": image}
    node = {"node-name": "disk", "file": file, "cache": {"direct": False}}
    for _ in range(3):
        assert await qmp.execute("blockdev-add", node) == {}
        device = {"id": "disk", "driver": "virtio-blk-mmio", "addr": "0x1"}
        assert await qmp.execute("device_add", device) == {}
        nodes = await qmp.execute("query-named-block-nodes")
        assert "disk" in [n["node-name"] for n in nodes], nodes
        assert await qmp.execute("device_del", {"id": "disk"}) == {}
        gone = await event(listener, "DEVICE_DELETED")
        assert gone == {"device": "disk", "path": "disk"}, gone

    for command, arguments, wanted in [
        ("no-such-command", {}, "CommandNotFound"),
        ("device_del", {"id": "disk"}, "DeviceNotFound"),
        ("balloon", {"value": 1 << 27}, "DeviceNotActive"),
        ("device_add", {"id": "x"}, "GenericError"),
    ]:
        try:
            await qmp.execute(command, arguments)
            raise AssertionError(f"{command} {arguments} is no error")
        except ExecuteError as error:
            assert error.error_class == wanted, error

    # Every command that is listed is described, and several requests at once get their own answers.
    commands = {c["name"] for c in await qmp.execute("query-commands")}
    schema = await qmp.execute("query-qmp-schema")
    assert commands == {t["name"] for t in schema if t["meta-type"] == "command"}
    answers = await asyncio.gather(*(qmp.execute("query-target") for _ in range(32)))
    assert all(a == answers[0] for a in answers), answers

    # A second script takes over where this one ends.
    await qmp.disconnect()
    again = QMPClient("again")
    again.register_listener(listener)
    await asyncio.wait_for(again.connect(socket), LIMIT)
    assert await again.execute("quit") == {}
    data = await event(listener, "SHUTDOWN")
    assert data == {"guest": False, "reason": "host-qmp-quit"}, data
    try:
        await again.disconnect()
    except (EOFError, OSError):
        # The VMM has hung up first.
        pass
    print("all as it should be")


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(main(sys.argv[1], os.path.abspath(sys.argv[2])), 120))
