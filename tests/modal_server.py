"""
A stand-in for Modal's servers, on 127.0.0.1: as much of their protocol as `modal run` needs for one
function at a time.

The client and the container are Modal's own code. A container is a process of Modal's entrypoint,
and starts with nothing but the files that the client has sent. A volume is a folder. The server
records what the platform is asked for.

What makes it like Modal: a container that ends without a result was preempted, so the next one gets
the same input. A failed input is given out again as often as the function's retry policy says.

test_modal.py uses this, see there: pytest -n 0 tests/test_modal.py
"""
import asyncio
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpclib.server
from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb
from modal_proto.api_grpc import ModalClientBase

IMAGE_BUILDER = '2025.06'


class QuietFiles(SimpleHTTPRequestHandler):
    """Serves the files of the volume."""

    def log_message(self, *args):
        pass


class Server:
    """
    A context manager: inside it the server runs, and processes with the environment `env` use it.

    project: the folder of modal_train.py. volume: the folder that is the volume. path: PATH of the
    client and the containers. on_commit(server) is called at each commit of the volume.

    What tests look at: requests(method); containers, which are processes; commits, each of them
    {file on the volume: when it was modified}.
    """

    def __init__(self, project, volume, path=None, on_commit=None):
        self.project = project
        self.volume = volume
        self.path = path or os.environ['PATH']
        self.on_commit = on_commit

        # What has happened
        self.asked = []       # [(method, request)]
        self.commits = []
        self.containers = []

        # What there is on the platform
        self.functions = {}   # {function id: its definition}
        self.calls = {}       # {call id: {'input', 'function', 'attempts', 'taken'}}
        self.outputs = {}     # {call id: its result}
        self.chunks = []      # what generators have yielded
        self.queue = []
        self.logs = []        # lines that containers have printed
        self.disconnected = False
        self.container_root = project / 'container'  # stands for / in containers

    # ----------------------------------------------------------------------------------------------
    # Starting and stopping

    def __enter__(self):
        self.volume.mkdir(exist_ok=True)
        shutil.rmtree(self.container_root, ignore_errors=True)
        (self.container_root / 'root').mkdir(parents=True)

        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True)
        self.thread.start()
        files = partial(QuietFiles, directory=str(self.volume))
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), files)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.ready.wait()
        return self

    async def serve(self):
        self.loop = asyncio.get_running_loop()
        self.changed = asyncio.Condition()
        self.over = asyncio.Event()

        # A class with a handler for each method of Modal's protocol
        methods = [name for name in dir(ModalClientBase) if name[0].isupper()]
        handlers = {name: self.handler(name) for name in methods}
        Servicer = type('Servicer', (ModalClientBase,), handlers)
        server = grpclib.server.Server([Servicer()])
        await server.start('127.0.0.1', 0)
        self.url = f'http://127.0.0.1:{server._server.sockets[0].getsockname()[1]}'
        self.ready.set()
        await self.over.wait()
        server.close()

    def __exit__(self, *_):
        for container in self.containers:
            if container.poll() is None:
                container.kill()
        self.http.shutdown()
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(10)

    @property
    def env(self):
        """The environment of a client: its account is made up."""
        return {
            **os.environ, 'PATH': self.path, 'POCKETGPT_VOLUME': str(self.volume),
            'MODAL_SERVER_URL': self.url, 'MODAL_TOKEN_ID': 'ak-x', 'MODAL_TOKEN_SECRET': 'as-x',
            'MODAL_CONFIG_PATH': str(self.project / 'none.toml'),
            'OMP_NUM_THREADS': '1', 'NO_COLOR': '1', 'COLUMNS': '200',
        }

    # ----------------------------------------------------------------------------------------------
    # Requests

    def requests(self, method):
        """All requests of this method so far."""
        return [request for name, request in self.asked if name == method]

    def handler(self, name):
        """The handler of a method: it calls our method of the same name."""
        async def handle(_, stream):
            request = await stream.recv_message()
            self.asked.append((name, request))
            method = getattr(self, name, None)
            if method is None:
                raise grpclib.GRPCError(grpclib.Status.UNIMPLEMENTED, name)
            answer = method(request)
            if hasattr(answer, '__anext__'):
                async for message in answer:
                    await stream.send_message(message)
                return
            if asyncio.iscoroutine(answer):
                answer = await answer
            await stream.send_message(answer)

        return handle

    async def notify(self):
        """Wake those who wait for a change."""
        async with self.changed:
            self.changed.notify_all()

    async def wait_until(self, condition):
        async with self.changed:
            await self.changed.wait_for(condition)

    # ----------------------------------------------------------------------------------------------
    # The client sets up its app

    def ClientHello(self, request):
        return pb.ClientHelloResponse()

    def EnvironmentGetOrCreate(self, request):
        settings = pb.EnvironmentSettings(image_builder_version=IMAGE_BUILDER)
        metadata = pb.EnvironmentMetadata(name='main', settings=settings)
        return pb.EnvironmentGetOrCreateResponse(environment_id='en-1', metadata=metadata)

    def AppCreate(self, request):
        return pb.AppCreateResponse(app_id='ap-1', app_page_url='http://x')

    def AppHeartbeat(self, request):
        return Empty()

    def AppPublish(self, request):
        return pb.AppPublishResponse()

    async def AppClientDisconnect(self, request):
        self.disconnected = True
        await self.notify()
        return Empty()

    async def AppGetLogs(self, request):
        sent = int(request.last_entry_id or 0)
        while sent < len(self.logs) or not self.disconnected:
            await self.wait_until(lambda: sent < len(self.logs) or self.disconnected)
            for text in self.logs[sent:]:
                sent += 1
                line = pb.TaskLogs(data=text, file_descriptor=pb.FILE_DESCRIPTOR_STDOUT)
                yield pb.TaskLogsBatch(entry_id=str(sent), items=[line])
        yield pb.TaskLogsBatch(app_done=True)

    def MountBatchedCheckExistence(self, request):
        return pb.MountBatchedCheckExistenceResponse()

    def MountPutFile(self, request):
        return pb.MountPutFileResponse(exists=True)

    def MountGetOrCreate(self, request):
        for file in request.files:
            self.mount(Path(file.filename))
        return pb.MountGetOrCreateResponse(
            mount_id=f'mo-{len(self.asked)}', handle_metadata=pb.MountHandleMetadata())

    def mount(self, path):
        """Give containers a file of the project: /root/pocketgpt/X is X, and so is /root/X."""
        for root in (Path('/root/pocketgpt'), Path('/root')):
            if path.is_relative_to(root):
                source = self.project / path.relative_to(root)
                break
        target = self.container_root / path.relative_to('/')
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)

    def ImageGetOrCreate(self, request):
        return pb.ImageGetOrCreateResponse(
            image_id=f'im-{len(self.asked)}', result=pb.GenericResult(status=1),
            metadata=pb.ImageMetadata(image_builder_version=IMAGE_BUILDER))

    def SecretGetOrCreate(self, request):
        return pb.SecretGetOrCreateResponse(secret_id='st-1')

    def VolumeGetOrCreate(self, request):
        metadata = pb.VolumeMetadata(name=request.deployment_name)
        return pb.VolumeGetOrCreateResponse(volume_id='vo-1', metadata=metadata)

    def FunctionPrecreate(self, request):
        return pb.FunctionPrecreateResponse(
            function_id=f'fu-{request.function_name}',
            handle_metadata=self.function_metadata(request.function_name, request.function_type))

    def FunctionCreate(self, request):
        if request.HasField('function'):
            definition = request.function
            ranked = pb.FunctionData.RankedFunction(function=definition)
            data = pb.FunctionData(ranked_functions=[ranked])
        else:  # one definition for each choice of GPU
            data = request.function_data
            definition = data.ranked_functions[0].function
        function_id = f'fu-{definition.function_name}'
        self.functions[function_id] = definition
        return pb.FunctionCreateResponse(
            function_id=function_id, function=request.function, function_data=data,
            handle_metadata=self.metadata_of(definition))

    def FunctionBindParams(self, request):
        definition = pb.Function()
        definition.CopyFrom(self.functions[request.function_id])
        bound_id = f'{request.function_id}-bound'
        self.functions[bound_id] = definition
        return pb.FunctionBindParamsResponse(
            bound_function_id=bound_id, handle_metadata=self.metadata_of(definition))

    def metadata_of(self, definition):
        return self.function_metadata(definition.function_name, definition.function_type)

    def function_metadata(self, name, kind):
        return pb.FunctionHandleMetadata(
            function_name=name, function_type=kind, definition_id='de-1', app_id='ap-1')

    # ----------------------------------------------------------------------------------------------
    # The client calls a function, containers run it

    async def FunctionMap(self, request):
        call = f'fc-{len(self.calls) + 1}'
        self.calls[call] = {
            'input': request.pipelined_inputs[0].input,
            'function': request.function_id,
            'attempts': 0,
            'taken': False,  # by a container
        }
        self.start_container(call)
        accepted = pb.FunctionPutInputsResponseItem(input_id=f'in-{call}')
        return pb.FunctionMapResponse(function_call_id=call, pipelined_inputs=[accepted])

    def start_container(self, call):
        """Start a container for a call."""
        self.calls[call]['taken'] = False
        function_id = self.calls[call]['function']
        definition = self.functions[function_id]
        task_id = f'ta-{len(self.containers)}'

        # What a container is told: its function, and the objects that the function uses
        function = pb.Object(
            object_id=function_id, function_handle_metadata=self.metadata_of(definition))
        objects = [function]
        for dependency in definition.object_dependencies:
            used = pb.Object(object_id=dependency.object_id)
            if dependency.object_id.startswith('vo'):
                used.volume_metadata.name = 'pocketgpt'
            objects.append(used)
        layout = pb.AppLayout(function_ids={definition.function_name: function_id}, objects=objects)
        arguments = pb.ContainerArguments(
            task_id=task_id, function_id=function_id, app_id='ap-1', function_def=definition,
            app_layout=layout, environment_name='main')
        arguments_file = self.container_root / f'arguments-{task_id}'
        arguments_file.write_bytes(arguments.SerializeToString())

        root = self.container_root / 'root'
        env = {
            **self.env, 'PYTHONPATH': str(root), 'PYTHONUNBUFFERED': '1', 'MODAL_IS_REMOTE': '1',
            'MODAL_CONTAINER_ARGUMENTS_PATH': str(arguments_file), 'MODAL_TASK_ID': task_id,
        }
        del env['MODAL_TOKEN_ID'], env['MODAL_TOKEN_SECRET']
        container = subprocess.Popen(
            [sys.executable, '-m', 'modal._container_entrypoint'], env=env, cwd=root,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.containers.append(container)
        threading.Thread(target=self.watch, args=(container, call), daemon=True).start()

    def watch(self, container, call):
        """In a thread: collect a container's log. If it ends without a result, start another."""
        for line in container.stdout:
            self.logs.append(line.decode('utf-8', 'replace'))
            if not self.over.is_set():
                asyncio.run_coroutine_threadsafe(self.notify(), self.loop)
        container.wait()
        if call not in self.outputs and not self.over.is_set():
            self.loop.call_soon_threadsafe(self.start_container, call)

    def ContainerHello(self, request):
        return Empty()

    async def ContainerHeartbeat(self, request):
        return pb.ContainerHeartbeatResponse()

    async def FunctionGetInputs(self, request):
        for name, call in self.calls.items():
            waiting = not call['taken'] and name not in self.outputs
            if waiting and call['function'] == request.function_id:
                call['taken'] = True
                item = pb.FunctionGetInputsItem(
                    input_id=f'in-{name}', input=call['input'], function_call_id=name,
                    retry_count=call['attempts'])
                return pb.FunctionGetInputsResponse(inputs=[item])
        stop = pb.FunctionGetInputsItem(kill_switch=True)
        return pb.FunctionGetInputsResponse(inputs=[stop])

    async def FunctionPutOutputs(self, request):
        for item in request.outputs:
            name = item.input_id.removeprefix('in-')
            call = self.calls[name]
            retries = self.functions[call['function']].retry_policy.retries
            failed = item.result.status != pb.GenericResult.GENERIC_STATUS_SUCCESS
            if failed and call['attempts'] < retries:
                call['attempts'] += 1  # its container ends now, and watch() starts another one
            else:
                self.outputs[name] = item
        await self.notify()
        return Empty()

    async def TaskResult(self, request):
        """A container could not even import modal_train.py."""
        for name in self.calls:
            self.outputs.setdefault(name, pb.FunctionPutOutputsItem(result=request.result))
        await self.notify()
        return Empty()

    async def FunctionGetOutputs(self, request):
        await self.wait_until(lambda: request.function_call_id in self.outputs)
        output = self.outputs[request.function_call_id]
        item = pb.FunctionGetOutputsItem(
            result=output.result, input_id=output.input_id, data_format=output.data_format)
        return pb.FunctionGetOutputsResponse(outputs=[item])

    async def FunctionCallPutDataOut(self, request):
        self.chunks.extend(request.data_chunks)
        await self.notify()
        return Empty()

    async def FunctionCallGetDataOut(self, request):
        sent = request.last_index
        while True:
            await self.wait_until(lambda: sent < len(self.chunks))
            for chunk in self.chunks[sent:]:
                sent += 1
                yield chunk

    # ----------------------------------------------------------------------------------------------
    # The volume, and a queue

    def VolumeCommit(self, request):
        modified = {}
        for path in self.volume.rglob('*'):
            if path.is_file():
                modified[str(path.relative_to(self.volume))] = path.stat().st_mtime_ns
        self.commits.append(modified)
        if self.on_commit:
            self.on_commit(self)
        return pb.VolumeCommitResponse(skip_reload=True)

    async def VolumeListFiles(self, request):
        folder = self.volume / request.path.strip('/')
        if not folder.is_dir():
            message = f'No such file or directory: {request.path}'
            raise grpclib.GRPCError(grpclib.Status.NOT_FOUND, message)
        entries = []
        for path in folder.rglob('*') if request.recursive else folder.iterdir():
            kind = 2 if path.is_dir() else 1
            name = str(path.relative_to(self.volume))
            entries.append(pb.FileEntry(path=name, type=kind, size=path.stat().st_size))
        yield pb.VolumeListFilesResponse(entries=entries)

    def VolumeGetFile2(self, request):
        size = (self.volume / request.path).stat().st_size
        url = f'http://127.0.0.1:{self.http.server_port}/{request.path}'
        return pb.VolumeGetFile2Response(get_urls=[url] if size else [], size=size, len=size)

    def QueueGetOrCreate(self, request):
        return pb.QueueGetOrCreateResponse(queue_id='qu-1')

    def QueueHeartbeat(self, request):
        return Empty()

    def QueueDelete(self, request):
        return Empty()

    async def QueuePut(self, request):
        self.queue.extend(request.values)
        await self.notify()
        return Empty()

    async def QueueGet(self, request):
        try:
            await asyncio.wait_for(self.wait_until(lambda: self.queue), request.timeout)
        except TimeoutError:
            return pb.QueueGetResponse()
        return pb.QueueGetResponse(values=[self.queue.pop(0)])
