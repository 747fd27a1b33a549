"""What a JobSet may look like: the fields that we write, of the types that v1alpha2 and batch/v1 give them.

Stricter than the cluster: a field that is not listed is refused, so that a slip of a key is seen.
"""

_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 45}
_WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 1}


def _object(required: str = "", **properties) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


_CONTAINER = _object(
    "name image command resources",
    name=_NAME,
    image={"type": "string", "minLength": 1},
    command=_list({"type": "string"}),
    env=_list(_object("name value", name={"type": "string"}, value={"type": "string"})),
    securityContext=_object(privileged={"type": "boolean"}),
    resources=_object("limits", limits=_object("google.com/tpu", **{"google.com/tpu": _COUNT})),
    volumeMounts=_list(_object("name mountPath", name=_NAME, mountPath={"type": "string"})),
)
_POD = _object(
    "restartPolicy nodeSelector containers",
    restartPolicy={"enum": ["Never"]},  # podFailurePolicy asks for it
    hostNetwork={"type": "boolean"},
    dnsPolicy={"enum": ["ClusterFirstWithHostNet"]},
    terminationGracePeriodSeconds=_COUNT,
    nodeSelector=_WORDS,
    tolerations=_list(_object(key={"type": "string"}, operator={"enum": ["Exists", "Equal"]})),
    priorityClassName=_NAME,
    serviceAccountName=_NAME,
    containers=_list(_CONTAINER),
    volumes=_list(
        _object("name emptyDir", name=_NAME, emptyDir=_object(medium={"enum": ["Memory"]}))
    ),
)
_JOB = _object(
    "parallelism completions completionMode backoffLimit template",
    parallelism=_COUNT,
    completions=_COUNT,
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    backoffLimit={"type": "integer", "minimum": 0},
    podFailurePolicy=_object(
        "rules",
        rules=_list(
            _object(
                "action onExitCodes",
                action={"enum": ["FailJob", "Ignore", "Count", "FailIndex"]},
                onExitCodes=_object(
                    "operator values",
                    containerName=_NAME,
                    operator={"enum": ["In", "NotIn"]},
                    values={
                        "type": "array",
                        "items": {"type": "integer", "minimum": 1, "maximum": 255},
                        "uniqueItems": True,
                        "minItems": 1,
                    },
                ),
            )
        ),
    ),
    template=_object("spec", metadata=_object(labels=_WORDS, annotations=_WORDS), spec=_POD),
)
SCHEMA = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object(
        "name namespace", name=_NAME, namespace=_NAME, labels=_WORDS, annotations=_WORDS
    ),
    spec=_object(
        "replicatedJobs failurePolicy",
        failurePolicy=_object(
            "maxRestarts rules",
            maxRestarts={"type": "integer", "minimum": 0},
            rules=_list(
                _object(
                    "action",
                    name=_NAME,
                    action={
                        "enum": [
                            "FailJobSet",
                            "RestartJobSet",
                            "RestartJobSetAndIgnoreMaxRestarts",
                        ]
                    },
                    onJobFailureReasons=_list(
                        {
                            "enum": [
                                "BackoffLimitExceeded",
                                "DeadlineExceeded",
                                "FailedIndexes",
                                "MaxFailedIndexesExceeded",
                                "PodFailurePolicy",
                            ]
                        }
                    ),
                )
            ),
        ),
        replicatedJobs=_list(
            _object(
                "name template",
                name=_NAME,
                replicas=_COUNT,
                template=_object("spec", metadata=_object(labels=_WORDS), spec=_JOB),
            )
        ),
    ),
)
