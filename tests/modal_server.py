"""A stand-in for Modal's servers on 127.0.0.1: just enough of their protocol for `modal run` of one function at a time.

It notes what the platform is asked for; a container is a process of Modal's own entrypoint, a volume is a folder. A container that
ends without an output was preempted: the same input goes to the next one; a failure is tried again as the function's policy says.
"""
import asyncio
import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpclib.server
from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb
from modal_proto.api_grpc import ModalClientBase


class Server:
    """A context manager: server.url; .asked: [(method, request)]; .commits: what was on the volume at each commit."""

    def __init__(self, root, volume):
        self.root, self.volume, self.asked, self.commits, self.functions, self.logs = root, volume, [], [], {}, []
        self.containers, self.outputs, self.data, self.queue, self.log_done, self.calls = [], {}, [], [], False, {}
        self.on_commit, self.path = lambda server: None, os.environ['PATH']

    def __enter__(self):
        ready = threading.Event()

        async def serve():
            self.loop = asyncio.get_running_loop()
            self.news = asyncio.Condition()
            names = {name for name in dir(ModalClientBase) if name[0].isupper()}
            made = type('Servicer', (ModalClientBase,), {name: self.handler(name) for name in names})
            server = grpclib.server.Server([made()])
            await server.start('127.0.0.1', 0)
            self.url = f'http://127.0.0.1:{server._server.sockets[0].getsockname()[1]}'
            self.over = asyncio.Event()
            ready.set()
            await self.over.wait()
            server.close()
        self.thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self.thread.start()
        root = str(self.volume)
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), type('Files', (SimpleHTTPRequestHandler,), {
            '__init__': lambda s, *a: SimpleHTTPRequestHandler.__init__(s, *a, directory=root), 'log_message': lambda *a: None}))
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        ready.wait()
        return self

    def __exit__(self, *_):
        for c in self.containers:
            if c.poll() is None:
                c.kill()
        self.http.shutdown()
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(10)

    @property
    def env(self):
        return {**os.environ, 'PATH': self.path, 'MODAL_SERVER_URL': self.url, 'MODAL_TOKEN_ID': 'ak-x', 'MODAL_TOKEN_SECRET': 'as-x', 'MODAL_CONFIG_PATH': str(self.root / 'none.toml'),
                'OMP_NUM_THREADS': '1', 'NO_COLOR': '1', 'COLUMNS': '200'}

    def requests(self, name):
        return [request for method, request in self.asked if method == name]

    def handler(self, name):
        async def handle(_, stream):
            request = await stream.recv_message()
            self.asked.append((name, request))
            answer = getattr(self, name, None)
            if answer is None:
                raise grpclib.GRPCError(grpclib.Status.UNIMPLEMENTED, name)
            answer = answer(request)
            if hasattr(answer, '__anext__'):
                async for message in answer:
                    await stream.send_message(message)
            else:
                await stream.send_message(await answer if asyncio.iscoroutine(answer) else answer)
        return handle

    async def tell(self):
        async with self.news:
            self.news.notify_all()

    async def until(self, what):
        async with self.news:
            await self.news.wait_for(what)

    # the client

    def ClientHello(self, r):
        return pb.ClientHelloResponse()

    def EnvironmentGetOrCreate(self, r):
        return pb.EnvironmentGetOrCreateResponse(environment_id='en-1', metadata=pb.EnvironmentMetadata(name='main', settings=pb.EnvironmentSettings(image_builder_version='2025.06')))

    def AppCreate(self, r):
        return pb.AppCreateResponse(app_id='ap-1', app_page_url='http://x')

    def AppHeartbeat(self, r):
        return Empty()

    def AppPublish(self, r):
        return pb.AppPublishResponse()

    async def AppClientDisconnect(self, r):
        self.log_done = True
        await self.tell()
        return Empty()

    async def AppGetLogs(self, r):
        at = int(r.last_entry_id or 0)
        while at < len(self.logs) or not self.log_done:
            await self.until(lambda: at < len(self.logs) or self.log_done)
            for text in self.logs[at:]:
                at += 1
                yield pb.TaskLogsBatch(entry_id=str(at), items=[pb.TaskLogs(data=text, file_descriptor=pb.FILE_DESCRIPTOR_STDOUT)])
        yield pb.TaskLogsBatch(app_done=True)

    def MountBatchedCheckExistence(self, r):
        return pb.MountBatchedCheckExistenceResponse()

    def MountPutFile(self, r):
        return pb.MountPutFileResponse(exists=True)

    def MountGetOrCreate(self, r):
        return pb.MountGetOrCreateResponse(mount_id=f'mo-{len(self.asked)}', handle_metadata=pb.MountHandleMetadata())

    def ImageGetOrCreate(self, r):
        return pb.ImageGetOrCreateResponse(image_id=f'im-{len(self.asked)}', result=pb.GenericResult(status=1), metadata=pb.ImageMetadata(image_builder_version='2025.06'))

    def SecretGetOrCreate(self, r):
        return pb.SecretGetOrCreateResponse(secret_id='st-1')

    def VolumeGetOrCreate(self, r):
        return pb.VolumeGetOrCreateResponse(volume_id='vo-1', metadata=pb.VolumeMetadata(name=r.deployment_name))

    def FunctionPrecreate(self, r):
        return pb.FunctionPrecreateResponse(function_id=f'fu-{r.function_name}', handle_metadata=self.metadata(r.function_name, r.function_type))

    def metadata(self, name, kind):
        return pb.FunctionHandleMetadata(function_name=name, function_type=kind, definition_id='de-1', app_id='ap-1')

    def FunctionCreate(self, r):
        definition = r.function if r.HasField('function') else r.function_data.ranked_functions[0].function
        self.functions[f'fu-{definition.function_name}'] = definition
        data = pb.FunctionData(ranked_functions=[pb.FunctionData.RankedFunction(function=definition)]) if r.HasField('function') else r.function_data
        return pb.FunctionCreateResponse(function_id=f'fu-{definition.function_name}', function=r.function, function_data=data, handle_metadata=self.metadata(definition.function_name, definition.function_type))

    def FunctionBindParams(self, r):
        bound = f'{r.function_id}-bound'
        self.functions[bound] = definition = pb.Function()
        definition.CopyFrom(self.functions[r.function_id])
        return pb.FunctionBindParamsResponse(bound_function_id=bound, handle_metadata=self.metadata(definition.function_name, definition.function_type))

    # calls

    async def FunctionMap(self, r):
        call = f'fc-{len(self.calls) + 1}'
        self.calls[call] = {'input': r.pipelined_inputs[0].input, 'function': r.function_id, 'attempts': 0, 'taken': False}
        self.start(call)
        return pb.FunctionMapResponse(function_call_id=call, pipelined_inputs=[pb.FunctionPutInputsResponseItem(input_id=f'in-{call}')])

    def start(self, call):
        """The next container for a call."""
        function, number = self.calls[call]['function'], len(self.containers)
        self.calls[call]['taken'] = False
        definition = self.functions[function]
        layout = pb.AppLayout(function_ids={definition.function_name: function}, objects=[
            pb.Object(object_id=function, function_handle_metadata=self.metadata(definition.function_name, definition.function_type)),
            *(pb.Object(object_id=d.object_id, **({'volume_metadata': pb.VolumeMetadata(name='pocketgpt')} if d.object_id[:2] == 'vo' else {}))
              for d in definition.object_dependencies)])
        arguments = pb.ContainerArguments(task_id=f'ta-{number}', function_id=function, app_id='ap-1', function_def=definition, app_layout=layout, environment_name='main')
        path = self.root / f'arguments-{number}'
        path.write_bytes(arguments.SerializeToString())
        env = {**self.env, 'MODAL_CONTAINER_ARGUMENTS_PATH': str(path), 'MODAL_TASK_ID': f'ta-{number}', 'MODAL_IS_REMOTE': '1', 'PYTHONPATH': str(self.root), 'PYTHONUNBUFFERED': '1'}
        for name in ('MODAL_TOKEN_ID', 'MODAL_TOKEN_SECRET'):
            env.pop(name)
        container = subprocess.Popen([sys.executable, '-m', 'modal._container_entrypoint'], env=env, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.containers.append(container)
        threading.Thread(target=self.watch, args=(container, call), daemon=True).start()

    def watch(self, container, call):
        for line in container.stdout:
            self.logs.append(line.decode('utf-8', 'replace'))
            if not self.over.is_set():
                asyncio.run_coroutine_threadsafe(self.tell(), self.loop)
        container.wait()
        if call not in self.outputs and not self.over.is_set():
            self.loop.call_soon_threadsafe(self.start, call)

    def ContainerHello(self, r):
        return Empty()

    async def ContainerHeartbeat(self, r):
        return pb.ContainerHeartbeatResponse()

    async def FunctionGetInputs(self, r):
        for name, call in self.calls.items():
            if call['function'] == r.function_id and not call['taken'] and name not in self.outputs:
                call['taken'] = True
                return pb.FunctionGetInputsResponse(inputs=[pb.FunctionGetInputsItem(input_id=f'in-{name}', input=call['input'], function_call_id=name, retry_count=call['attempts'])])
        return pb.FunctionGetInputsResponse(inputs=[pb.FunctionGetInputsItem(kill_switch=True)])

    async def FunctionPutOutputs(self, r):
        for item in r.outputs:
            call = item.input_id.removeprefix('in-')
            failed = item.result.status != pb.GenericResult.GENERIC_STATUS_SUCCESS
            if failed and self.calls[call]['attempts'] < self.functions[self.calls[call]['function']].retry_policy.retries:
                self.calls[call]['attempts'] += 1  # its container ends now, and the next is started
                continue
            self.outputs[call] = item
        await self.tell()
        return Empty()

    async def TaskResult(self, r):  # it could not even import the module
        for call in self.calls:
            self.outputs.setdefault(call, pb.FunctionPutOutputsItem(result=r.result))
        await self.tell()
        return Empty()

    async def FunctionGetOutputs(self, r):
        await self.until(lambda: r.function_call_id in self.outputs)
        item = self.outputs[r.function_call_id]
        return pb.FunctionGetOutputsResponse(outputs=[pb.FunctionGetOutputsItem(result=item.result, input_id=item.input_id, data_format=item.data_format)])

    async def FunctionCallPutDataOut(self, r):
        self.data.extend(r.data_chunks)
        await self.tell()
        return Empty()

    async def FunctionCallGetDataOut(self, r):
        at = r.last_index
        while True:
            await self.until(lambda: at < len(self.data))
            for chunk in self.data[at:]:
                at += 1
                yield chunk

    # the volume and a queue

    def VolumeCommit(self, r):
        self.commits.append({str(p.relative_to(self.volume)): p.stat().st_mtime_ns for p in self.volume.rglob('*') if p.is_file()})
        self.on_commit(self)
        return pb.VolumeCommitResponse(skip_reload=True)

    async def VolumeListFiles(self, r):
        folder = self.volume / r.path.strip('/')
        if not folder.is_dir():
            raise grpclib.GRPCError(grpclib.Status.NOT_FOUND, f'No such file or directory: {r.path}')
        yield pb.VolumeListFilesResponse(entries=[pb.FileEntry(path=str(p.relative_to(self.volume)), type=2 if p.is_dir() else 1, size=p.stat().st_size) for p in (folder.rglob('*') if r.recursive else folder.iterdir())])

    def VolumeGetFile2(self, r):
        size = (self.volume / r.path).stat().st_size
        url = f'http://127.0.0.1:{self.http.server_port}/{r.path}'
        return pb.VolumeGetFile2Response(get_urls=[url] if size else [], size=size, len=size)

    def QueueGetOrCreate(self, r):
        return pb.QueueGetOrCreateResponse(queue_id='qu-1')

    def QueueHeartbeat(self, r):
        return Empty()

    def QueueDelete(self, r):
        return Empty()

    async def QueuePut(self, r):
        self.queue.extend(r.values)
        await self.tell()
        return Empty()

    async def QueueGet(self, r):
        try:
            await asyncio.wait_for(self.until(lambda: self.queue), r.timeout)
        except TimeoutError:
            return pb.QueueGetResponse()
        return pb.QueueGetResponse(values=[self.queue.pop(0)])


def copied(project):
    """A project whose modal_train.py has its volume, and its place in containers, in the project's own folder."""
    path = project.root / 'modal_train.py'
    text = path.read_text(encoding='utf-8')
    for before, after in (("'/vol'", project.root / 'vol'), ("'/root/pocketgpt')\n", project.root)):
        assert text.count(before) == 1
        text = text.replace(before, repr(str(after)) + before[len(before.rstrip(')\n')):])
    path.write_text(text, encoding='utf-8')
    Path(project.root / 'vol').mkdir()
    return path
