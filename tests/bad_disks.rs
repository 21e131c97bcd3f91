//! Disks that refuse, case by case: the exit code, one message that names what is wrong, and nothing lost.

mod common;

use common::Project;
use std::process::Command;

#[test]
fn a_disk_that_refuses_checkpoints_for_a_while() {
    let project = Project::new();
    let mut running = project.train_on("run", &["--set", "checkpoint.keep=3"]);
    running.until("a checkpoint", || !project.checkpoints("run").is_empty());
    // Even the system's administrator cannot make a directory in a file.
    project.write("away", b"no directory");
    project.exchange("run/checkpoints", "away");
    let alarm = |text: &str| {
        text.lines().any(|l| l.starts_with("warning: step") && l.contains("is NOT saved") && l.contains("checkpoints"))
    };
    let said = running.words();
    running.until("an alarm", || alarm(&said()));
    let lines = project.log_lines("run");
    running.until("more steps", || project.log_lines("run") > lines + 20);
    project.exchange("run/checkpoints", "away");
    let last = *project.checkpoints("run").last().unwrap();
    running.until("a checkpoint after it", || project.checkpoints("run").last().is_some_and(|&step| step > last));
    running.signal(rustix::process::Signal::TERM);
    let (code, stderr) = running.wait();
    assert_eq!(code, Some(75), "{stderr}");
    let end = *project.checkpoints("run").last().unwrap();
    project.hashes("run", end);
}

/// Trains to step 5, to step 10 while checkpoints cannot be written, and to step 10 again: `sh -c script` with the program and its
/// arguments behind it is the second of these.
fn cannot_be_saved(project: &Project, limited: &mut Command, words: &[&str]) {
    project.trained("straight", &["--set", "train.steps=10"]);
    project.trained("run", &["--set", "train.steps=5"]);
    let saved = project.hashes("run", 5);
    let arguments =
        ["train", "config.toml", "--run-dir", "run", "--set", "train.steps=10", "--set", "checkpoint.every=1"];
    let output = limited
        .arg(env!("CARGO_BIN_EXE_ddpm-dist"))
        .args(arguments)
        .current_dir(project.path(""))
        .env("XDG_CACHE_HOME", project.path("cache"))
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let ended = common::Ended { code: output.status.code().unwrap_or(-1), stderr, stdout: String::new() };
    ended.warned(&["is NOT saved", "training goes on"]);
    ended.refused(4, &["the state at step 10 could not be saved"]);
    for word in words {
        assert!(ended.stderr.contains(word), "{word:?} is not in {}", ended.stderr);
    }
    assert_eq!((project.checkpoints("run"), project.hashes("run", 5)), (vec![5], saved));
    let entries = std::fs::read_dir(project.path("run/checkpoints")).unwrap().count();
    assert_eq!(entries, 1, "a save that failed leaves nothing behind");
    project.trained("run", &["--set", "train.steps=10"]);
    assert_eq!(project.hashes("run", 10), project.hashes("straight", 10));
    assert_eq!(project.measured("run"), project.measured("straight"));
}

#[test]
fn a_file_that_cannot_grow() {
    // Files end at 32 KiB, which is less than a shard and more than a log.
    let script = r#"trap '' XFSZ; ulimit -f 64; exec "$0" "$@""#;
    cannot_be_saved(&Project::new(), Command::new("sh").args(["-c", script]), &["shard-00000"]);
}

#[test]
fn a_log_that_cannot_grow_is_one_alarm() {
    let project = Project::new();
    project.trained("straight", &["--set", "train.steps=60"]);
    let log = std::fs::metadata(project.path("straight/log.jsonl")).unwrap().len();
    let config = std::fs::metadata(project.path("straight/config.toml")).unwrap().len();
    // Files end at 4 KiB, which is more than a config and less than a log (and a checkpoint).
    assert!(config < 4096 && log > 2 * 4096, "{config} and {log} bytes");
    let script = r#"trap '' XFSZ; ulimit -f 8; exec "$0" train config.toml --run-dir run --set train.steps=60"#;
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_ddpm-dist")])
        .current_dir(project.path(""))
        .env("XDG_CACHE_HOME", project.path("cache"))
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let is_alarm = |line: &&str| line.starts_with("warning: cannot write") && line.contains("log.jsonl");
    assert_eq!(stderr.lines().filter(is_alarm).count(), 1, "{stderr}");
    assert_eq!(output.status.code(), Some(4), "the last state is not saved: {stderr}");
}

#[test]
fn a_full_disk() {
    // A small file system of its own, seen by one process tree alone. Ten checkpoints (0.7 MiB each) and the room that is asked for one
    // (1.8 MiB) fit, so that it is full only with the filler.
    let mount = "mount -t tmpfs -o size=16m none disk";
    let project = Project::new();
    std::fs::create_dir(project.path("disk")).unwrap();
    let allowed = Command::new("unshare").args(["-m", "sh", "-c", mount]).current_dir(project.path("")).output();
    if !allowed.is_ok_and(|o| o.status.success()) {
        return common::not_tested("a full disk: a file system cannot be mounted here (it takes root and unshare)");
    }
    let train = r#""$0" train config.toml --run-dir disk/run --set checkpoint.every=1 --set checkpoint.keep=3 --set train.steps"#;
    let script = format!(
        r#"{mount} || exit 99
        fill() {{ free=$(df -k --output=avail disk | tail -n 1); head -c $(( (free - 300) * 1024 )) /dev/zero > disk/filler; }}
        {train}=1000000 2> said & run=$!
        newest() {{ last=$(ls disk/run/checkpoints 2> none | grep -x 'step-[0-9]*' | tail -n 1); last=${{last#step-}}; echo $((10#${{last:-0}})); }}
        reached() {{ [ "$(newest)" -ge 5 ]; }}
        until_true() {{ for _ in $(seq 6000); do "$@" && return; kill -0 $run || exit 98; sleep 0.02; done; kill -9 $run; exit 97; }}
        until_true reached
        fill
        until_true grep -q 'is NOT saved' said
        kill -TERM $run; wait $run; echo "left with $?"; cat said >&2
        {train}=1000000; echo "refused with $?"
        rm disk/filler
        last=$(($(newest) + 5))
        {train}=$last || exit 2
        cp -r disk/run copied
        echo $last"#
    );
    let output = Command::new("unshare")
        .args(["-m", "bash", "-c", &script, env!("CARGO_BIN_EXE_ddpm-dist")])
        .current_dir(project.path(""))
        .env("XDG_CACHE_HOME", project.path("cache"))
        .output()
        .unwrap();
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(0), "{stdout}{stderr}");
    let ended = common::Ended { code: 0, stderr, stdout };
    ended.warned(&["is NOT saved", "not enough space", "training goes on"]);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(lines[..2], ["left with 4", "refused with 4"], "{ended:?}");
    let messages: Vec<&str> = ended.stderr.split("ddpm-dist: ").skip(1).collect();
    assert!(messages[0].contains("could not be saved") && messages[0].contains("checkpoint.keep"), "{messages:?}");
    assert!(messages[1].contains("room") && messages[1].contains("disk/run"), "{messages:?}");
    let last = lines[2].parse().unwrap();
    project.trained("straight", &["--set", &format!("train.steps={last}"), "--set", "checkpoint.every=1"]);
    assert_eq!(project.hashes("copied", last), project.hashes("straight", last));
}
