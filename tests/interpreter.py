"""A state machine run here: its definition on moto's interpreter, with handlers for the services that are not there.

moto has no job of SageMaker that Step Functions waits for, no redrive, waits in real time and leaves JSONata out. What is put in
their place is inside of moto, so its version is pinned; test_aws_definitions.py says if it has moved.
"""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import boto3
from jsonata import Jsonata
from moto import mock_aws
from moto.stepfunctions.parser.api import ExecutionStatus, HistoryEventType
from moto.stepfunctions.parser.asl.eval.event.event_detail import EventDetails
from moto.stepfunctions.parser.asl.parse.asl_parser import AmazonStateLanguageParser
from moto.stepfunctions.parser.models import stepfunctions_parser_backends

REGION, ACCOUNT = "eu-central-1", "123456789012"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/flow"
SECONDS = 30
NO_UUID = '"Function $uuid is currently not supported"'  # moto's function

_ASL = "moto.stepfunctions.parser.asl"
_TASK = f"{_ASL}.component.state.exec.state_task.service"
_ERRORS = f"{_ASL}.component.common.error_name"
PATCH_POINTS = {
    "parse": (f"{_ASL}.parse.asl_parser", "AmazonStateLanguageParser", "parse"),
    "task": (f"{_TASK}.state_task_service", "StateTaskService", "_eval_execution"),
    "pattern": (f"{_TASK}.state_task_service_callback", "StateTaskServiceCallback", "_assert_integration_pattern_is_supported"),
    "retry": (f"{_ASL}.component.common.retry.retrier_decl", "time"),
    "jitter": (f"{_ASL}.component.common.retry.jitter_strategy_decl", "random"),
    "wait": (f"{_ASL}.component.state.wait.wait_function.wait_function", "WaitFunction", "_wait_interval"),
    "jsonata": (f"{_ASL}.jsonata.jsonata", "_eval_jsonata"),
    "variables": (f"{_ASL}.eval.variable_store", "encode_jsonata_variable_declarations"),
    "states": (f"{_ASL}.eval.states", "encode_jsonata_variable_declarations"),
}  # fmt: skip

Handler = Callable[[dict[str, Any], int], Any]
"""(arguments of the task, how often it was tried before) → its result; or it raises TaskError."""


class TaskError(Exception):
    """What Step Functions says of a task that failed."""

    def __init__(self, error: str, cause: str = "") -> None:
        super().__init__(error, cause)
        self.error, self.cause = error, cause


@dataclass
class Execution:
    """That has ended."""

    status: str
    output: Any
    error: str
    cause: str
    states: list[str]
    """In the order in which they were entered."""
    arn: str


@dataclass
class Interpreter:
    handlers: Mapping[str, Handler]
    """By the name of the task's state."""
    calls: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    """Arguments of the tasks that have a handler, by the name of the state."""
    slept: list[float] = field(default_factory=list)
    """Seconds: of retries the longest that jitter allows, and of states that wait."""


@cache
def client_of(service: str) -> Any:
    """Of moto's AWS; made once, because it takes longer than an execution."""
    return boto3.client(service, REGION)


def create(name: str, machine: Mapping[str, Any]) -> str:
    """ARN of a new state machine with this definition."""
    client = client_of("stepfunctions")
    return client.create_state_machine(name=name, definition=json.dumps(machine), roleArn=ROLE)["stateMachineArn"]


def execute(machine: str, given: Any, name: str = "") -> Execution:
    """An execution of the state machine with this ARN, when it has ended."""
    client = client_of("stepfunctions")
    started = client.start_execution(stateMachineArn=machine, input=json.dumps(given), name=name or str(uuid.uuid4()))
    return wait_for_end(started["executionArn"])


def wait_for_end(arn: str) -> Execution:
    """An execution, when it is over."""
    client, end = client_of("stepfunctions"), time.monotonic() + SECONDS
    while (execution := client.describe_execution(executionArn=arn))["status"] == "RUNNING":
        assert time.monotonic() < end, "the execution does not end"
        time.sleep(0.005)
    history = client.get_execution_history(executionArn=arn, maxResults=1000)["events"]
    return Execution(
        execution["status"],
        json.loads(execution.get("output", "null")),
        execution.get("error", ""),
        execution.get("cause", ""),
        [event["stateEnteredEventDetails"]["name"] for event in history if "stateEnteredEventDetails" in event],
        arn,
    )


def redrive(arn: str) -> None:
    """Has an execution that did not succeed go on, in the state in which it ended, with the variables that it had."""
    execution = stepfunctions_parser_backends[ACCOUNT][REGION].describe_execution(arn)
    worker, machine = execution.exec_worker, json.loads(execution.state_machine.definition)
    environment = worker.env
    context = environment.states.context_object.context_object_data["Execution"]
    context["RedriveCount"] = context.get("RedriveCount", 0) + 1
    environment.event_manager.add_event(
        context=environment.event_history_context,
        event_type=HistoryEventType.ExecutionRedriven,
        event_details=EventDetails(executionRedrivenEventDetails={"redriveCount": context["RedriveCount"]}),
    )
    history = environment.event_manager.get_event_history()
    entered = [event["stateEnteredEventDetails"]["name"] for event in history if "stateEnteredEventDetails" in event]
    last = [state for state in entered if state in machine["States"]][-1]  # and none of those in a Map
    program, _ = AmazonStateLanguageParser.parse(json.dumps({**machine, "StartAt": last}))
    environment._program_state, environment.stack, environment.heap = None, [], {}
    execution.exec_status, execution.stop_date = ExecutionStatus.RUNNING, None
    execution.error = execution.cause = None

    def run() -> None:
        program.eval(environment)
        worker._execution_communication.terminated()

    threading.Thread(target=run, daemon=True).start()


@contextmanager
def interpreter(handlers: Mapping[str, Handler]) -> Iterator[Interpreter]:
    """AWS by moto, empty, whose state machines run, without waiting."""
    machine = Interpreter(handlers)
    with ExitStack() as stack:
        stack.enter_context(mock_aws(config={"stepfunctions": {"execute_state_machine": True}}))

        def put(point: str, value: Any) -> None:
            stack.enter_context(patch.object(*found(point), value))

        put("parse", staticmethod(cache(getattr(*found("parse")))))  # which takes longer than an execution
        ordinary = getattr(*found("task"))
        put("task", lambda task, env: _task(machine, ordinary, task, env))
        put("pattern", lambda task: None)
        put("retry", SimpleNamespace(sleep=machine.slept.append))
        put("jitter", SimpleNamespace(uniform=lambda low, high: high))
        put("wait", lambda state, env, wait_seconds: machine.slept.append(wait_seconds))
        queries = _Queries()
        put("jsonata", queries.evaluate)
        put("variables", queries.declare)
        put("states", queries.declare)
        yield machine


def found(point: str) -> tuple[Any, str]:
    """(owner, name) of what is replaced in moto."""
    module, *names = PATCH_POINTS[point]
    owner = import_module(module)
    for name in names[:-1]:
        owner = getattr(owner, name)
    return owner, names[-1]


class _Queries:
    """JSONata. Variables are values, not the text that moto makes of them: that is slow, and breaks at quotation marks."""

    def __init__(self) -> None:
        self._declared: list[Mapping[str, Any]] = []

    def declare(self, bindings: Mapping[str, Any]) -> str:
        """What stands for them before an expression: a comment."""
        self._declared.append(dict(bindings))
        return f"/*{len(self._declared) - 1}*/"

    def evaluate(self, expression: str) -> Any:
        query = Jsonata(expression.replace(NO_UUID, f'"{uuid.uuid4()}"'))
        frame = query.create_frame()
        for number in re.findall(r"/\*(\d+)\*/", expression):
            for name, value in self._declared[int(number)].items():
                frame.bind(name.removeprefix("$"), value)
        return query.evaluate(None, frame)


def _task(machine: Interpreter, ordinary: Callable[[Any, Any], None], task: Any, env: Any) -> None:
    """A task with the handler of its state, if there is one."""
    if task.name not in machine.handlers:
        return ordinary(task, env)
    task.resource.eval(env=env)
    part = env.stack.pop()
    arguments = task._eval_parameters(env=env)
    credentials = task._eval_state_credentials(env=env)
    task._before_eval_execution(
        env=env, resource_runtime_part=part, raw_parameters=arguments, state_credentials=credentials
    )
    machine.calls[task.name].append(arguments)
    attempt = env.states.context_object.context_object_data["State"].get("RetryCount", 0)
    try:
        result = machine.handlers[task.name](arguments, attempt)
    except TaskError as error:
        raise _failure(env, error) from None
    env.stack.append(json.loads(json.dumps(result)))
    owner, _ = found("task")  # of which those that wait for a job are subclasses
    owner._after_eval_execution(
        task, env=env, resource_runtime_part=part, normalised_parameters=arguments, state_credentials=credentials
    )
    return None


def _failure(env: Any, error: TaskError) -> Exception:
    api = import_module("moto.stepfunctions.parser.api")
    event = import_module(f"{_ERRORS}.failure_event")
    details = import_module(f"{_ASL}.eval.event.event_detail").EventDetails
    name: Any
    if error.error.startswith("States."):
        typ = import_module(f"{_ERRORS}.states_error_name_type").StatesErrorNameType.from_name(error.error)
        name = import_module(f"{_ERRORS}.states_error_name").StatesErrorName(typ=typ)
    else:
        name = import_module(f"{_ERRORS}.custom_error_name").CustomErrorName(error.error)
    said = api.TaskFailedEventDetails(error=error.error, cause=error.cause)
    return event.FailureEventException(
        event.FailureEvent(
            env=env,
            error_name=name,
            event_type=api.HistoryEventType.TaskFailed,
            event_details=details(taskFailedEventDetails=said),
        )
    )
