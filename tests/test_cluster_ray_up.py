"""The files for `ray up`: Ray's own schema takes them, they hold nothing secret, and AWS (moto's) makes the machines they describe."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import moto
import pytest
import yaml
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from cluster.serve import FAST_SERVE

FOLDER = Path(__file__).resolve().parent.parent / "cluster" / "ray"
CLOUDS = ("aws", "gcp")
ROLES = ("prefill", "decode")
REGION = "us-east-2"
Config = dict[str, Any]


def read(name: str) -> Config:
    config: Config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return config


def environment(name: str) -> dict[str, str]:
    """What Ray's processes have in their environment."""
    if name == "local":
        lines = re.findall(r"^export (RAY\w+)=(\S+)$", (FOLDER / "environment.sh").read_text(), re.MULTILINE)
    else:
        options = read(name)["docker"]["run_options"]
        lines = [re.fullmatch(r"--env (\w+)=(\S+)", o).groups() for o in options if o.startswith("--env")]  # type: ignore[union-attr]
    return dict(lines)


@pytest.mark.parametrize("name", [*CLOUDS, "local"])
def test_ray_takes_the_file(name: str) -> None:
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_refuses_what_it_does_not_know(name: str) -> None:
    config = read(name)
    config["available_node_types"]["prefill"]["max_worker"] = 1
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", [*CLOUDS, "local"])
def test_ray_s_processes_run_serve_as_make_serve_does(name: str) -> None:
    found = environment(name)
    wanted = FAST_SERVE | {"RAY_AUTH_MODE": "token"}  # more than one machine: anyone in the network could try
    assert {key: value for key, value in found.items() if key in wanted} == wanted
    assert all(key.startswith("RAY_health_check") for key in found.keys() - wanted - {"RAY_AUTH_TOKEN_PATH"})


@pytest.mark.parametrize("name", CLOUDS)
def test_groups_keep_their_limits(name: str) -> None:
    config = read(name)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert sum(types[role]["max_workers"] for role in ROLES) <= config["max_workers"]
    for role in ROLES:
        assert 1 <= types[role]["min_workers"] <= types[role]["max_workers"]
        assert types[role]["labels"] == {"lightship-role": role}
        assert types[role]["resources"]["GPU"] == 8
    assert types["prefill"]["node_config"] == types["decode"]["node_config"]


@pytest.mark.parametrize("name", [*CLOUDS, "local"])
def test_nothing_secret_is_mounted(name: str) -> None:
    """The token goes from a secret store, or an operator's hand, to each machine; a mount would leave copies on every disk."""
    mounts = read(name)["file_mounts"]
    assert set(mounts.values()) <= {"~/lightship-settings", "."}
    text = (FOLDER / f"{name}.yaml").read_text()
    assert not re.search(r"(?i)(password|token|secret|key)\s*[:=]\s*['\"]?[0-9a-z+/]{16,}", text)


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """An account with what an operator has to make, and aws.yaml with it filled in. Ray writes its key to $HOME/.ssh."""
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    with moto.mock_aws():
        ec2, iam = boto3.client("ec2", REGION), boto3.client("iam", REGION)
        subnet = ec2.describe_subnets(Filters=[{"Name": "availabilityZone", "Values": [f"{REGION}a"]}])[
            "Subnets"
        ][0]
        group = ec2.create_security_group(GroupName="lightship", Description="-", VpcId=subnet["VpcId"])
        for profile in ("HEAD_PROFILE", "GPU_PROFILE"):
            iam.create_instance_profile(InstanceProfileName=profile)
        made = {
            "SUBNET": subnet["SubnetId"],
            "SECURITY_GROUP": group["GroupId"],
            "AMI": ec2.register_image(Name="deep-learning", RootDeviceName="/dev/sda1")["ImageId"],
        }
        text = (FOLDER / "aws.yaml").read_text()
        for name, value in made.items():
            text = re.sub(rf"(?<=[ \[]){name}(?=[\]\s,}}])", value, text)
        yield yaml.safe_load(text)


def tags(role: str) -> dict[str, str]:
    kind = "head" if role == "head" else "worker"
    return {TAG_RAY_NODE_KIND: kind, TAG_RAY_USER_NODE_TYPE: role, TAG_RAY_LAUNCH_CONFIG: "-"}


def test_aws_makes_the_machines(aws: Config, tmp_path: Path) -> None:
    prepared = prepare_config(copy.deepcopy(aws))
    validate_config(prepared)
    config = bootstrap_aws(prepared)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for role in ("head", *ROLES):
        kind = config["available_node_types"][role]
        provider.create_node_with_resources_and_labels(
            kind["node_config"], tags(role), 1, kind["resources"], kind.get("labels", {})
        )
    found = {}
    for reservation in boto3.client("ec2", REGION).describe_instances()["Reservations"]:
        for instance in reservation["Instances"]:
            given = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
            found[given[TAG_RAY_USER_NODE_TYPE]] = instance
    assert {role: instance["InstanceType"] for role, instance in found.items()} == {
        "head": "m7i.2xlarge",
        "prefill": "p5en.48xlarge",
        "decode": "p5en.48xlarge",
    }
    wanted = aws["available_node_types"]["head"]["node_config"]
    for role, instance in found.items():
        profile = "HEAD_PROFILE" if role == "head" else "GPU_PROFILE"
        assert instance["IamInstanceProfile"]["Arn"].endswith(profile)
        assert instance["SubnetId"] == wanted["SubnetIds"][0]
    # moto forgets the groups of network interfaces.
    assert [group["GroupId"] for group in found["head"]["SecurityGroups"]] == wanted["SecurityGroupIds"]
    groups = boto3.client("ec2", REGION).describe_security_groups()["SecurityGroups"]
    assert {group["GroupName"] for group in groups} == {
        "default",
        "lightship",
    }  # none that is open to the world
    keys = list((tmp_path / ".ssh").iterdir())
    assert [key.suffix for key in keys] == [".pem"]
    assert keys[0].stat().st_mode & 0o077 == 0


def test_aws_refuses_a_misspelt_setting(aws: Config) -> None:
    """What Ray's schema lets through, boto does not."""
    aws["available_node_types"]["head"]["node_config"]["InstanceTyp"] = "m7i.2xlarge"
    config = bootstrap_aws(prepare_config(aws))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    kind = config["available_node_types"]["head"]
    with pytest.raises(Exception, match="InstanceTyp"):
        provider.create_node_with_resources_and_labels(kind["node_config"], tags("head"), 1, {}, {})
