//! What appears, on a terminal and off it.

use indicatif::TermLike;

use super::*;

/// A terminal of which the bytes are kept: bars and messages land in the same place, as on a screen.
#[derive(Clone, Debug, Default)]
pub struct Screen(Arc<Mutex<Vec<u8>>>);

impl Screen {
    pub fn text(&self) -> String {
        String::from_utf8(lock(&self.0).clone()).unwrap()
    }

    /// The screen as a person sees it, lines that are as wide as the screen wrapped at the next letter. `\u{1}` clears the
    /// current line, `\u{2}` and `\u{3}` move up and down by as many lines as the next letter says.
    fn visible(&self) -> Vec<String> {
        let mut lines = vec![String::new()];
        let mut row = 0;
        let text = self.text();
        let mut letters = text.chars();
        while let Some(letter) = letters.next() {
            match letter {
                '\u{1}' => lines[row].clear(),
                '\u{2}' => row -= letters.next().unwrap() as usize,
                '\u{3}' => row += letters.next().unwrap() as usize,
                letter => {
                    if letter == '\n' || lines[row].chars().count() == usize::from(self.width()) {
                        row += 1;
                    }
                    if row == lines.len() {
                        lines.push(String::new());
                    }
                    if letter != '\n' {
                        lines[row].push(letter);
                    }
                }
            }
        }
        lines.into_iter().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect()
    }

    fn put(&self, text: &str) -> io::Result<()> {
        lock(&self.0).extend_from_slice(text.as_bytes());
        Ok(())
    }

    fn moved(&self, code: char, n: usize) -> io::Result<()> {
        if n == 0 { Ok(()) } else { self.put(&format!("{code}{}", n as u8 as char)) }
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl TermLike for Screen {
    fn width(&self) -> u16 {
        100
    }
    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.moved('\u{2}', n)
    }
    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.moved('\u{3}', n)
    }
    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn write_line(&self, text: &str) -> io::Result<()> {
        self.put(&format!("{text}\n"))
    }
    fn write_str(&self, text: &str) -> io::Result<()> {
        self.put(text)
    }
    fn clear_line(&self) -> io::Result<()> {
        self.put("\u{1}")
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

pub fn plain(verbosity: Verbosity, every: Duration) -> (Console, Screen) {
    let screen = Screen::default();
    let out = Arc::new(Mutex::new(screen.clone()));
    (Console::with(verbosity, ProgressDrawTarget::hidden(), out, every), screen)
}

fn terminal(verbosity: Verbosity) -> (Console, Screen) {
    let screen = Screen::default();
    let out = Arc::new(Mutex::new(screen.clone()));
    let target = ProgressDrawTarget::term_like(Box::new(screen.clone()));
    (Console::with(verbosity, target, out, Duration::ZERO), screen)
}

/// One of everything.
fn speak(console: &Console) {
    console.say("hello");
    console.detail("detail");
    let bar = console.bar("decoding", 10);
    bar.inc(3);
    drop(bar);
    let mut training = console.training(0, 100, 8);
    training.advance(1);
    training.report(10, 0.5, 72.0);
    drop(training);
    console.alarm("disk full");
    console.error("diverged");
    console.last("done");
}

#[test]
fn plain_lines_by_verbosity() {
    let spoken = |verbosity| {
        let (console, screen) = plain(verbosity, Duration::ZERO);
        speak(&console);
        screen.text()
    };
    assert_eq!(spoken(Verbosity::Quiet), "warning: disk full\nerror: diverged\ndone\n");
    let normal = "hello\ndecoding 3/10\nstep 10/100  loss 0.5000  72.0 img/s  10s left\nwarning: disk full\n\
                  error: diverged\ndone\n";
    assert_eq!(spoken(Verbosity::Normal), normal);
    assert_eq!(spoken(Verbosity::Verbose), normal.replace("hello\n", "hello\ndetail\n"));
}

#[test]
fn plain_lines_come_at_a_bounded_rate_and_the_first_and_last_step_always() {
    let (console, screen) = plain(Verbosity::Normal, Duration::from_secs(3600));
    let mut training = console.training(0, 1000, 8);
    let bar = console.bar("decoding", 1000);
    for done in 1..=1000 {
        bar.set(done);
        training.advance(done);
        training.report(done, 0.25, 1234.0);
    }
    let first = "step 1/1000  loss 0.2500  1234 img/s  6s left\n"; // 999·8/1234 = 6.48
    assert_eq!(screen.text(), format!("{first}step 1000/1000  loss 0.2500  1234 img/s  0s left\n"));
}

#[test]
fn numbers_are_due_at_the_first_step_and_when_they_are_old() {
    for (every, old) in [(Duration::from_secs(3600), false), (Duration::from_millis(1), true)] {
        let (console, _) = plain(Verbosity::Normal, every);
        let mut training = console.training(40, 100, 8);
        assert!(training.is_due());
        training.advance(41);
        assert!(training.is_due(), "a step without numbers is no news");
        training.report(42, 0.5, 1.0);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(training.is_due(), old);
    }
}

#[test]
fn a_speed_that_is_no_number_gives_no_time_left() {
    let (console, screen) = plain(Verbosity::Normal, Duration::ZERO);
    let mut training = console.training(0, 10, 8);
    for speed in [0.0, f64::NAN] {
        training.report(1, f64::NAN, speed);
    }
    assert_eq!(screen.text(), "step 1/10  loss NaN  0.00 img/s\nstep 1/10  loss NaN  NaN img/s\n");
}

#[test]
fn bars_on_a_terminal_and_messages_above_them() {
    let (console, screen) = terminal(Verbosity::Normal);
    let mut training = console.training(100, 1000, 32);
    assert!(screen.visible()[0].starts_with("step 100/1000 "), "{:?}", screen.visible());
    training.report(550, 0.03125, 160.0);
    console.say("a message");
    let sampling = console.bar("sampling", 50);
    sampling.set(25);
    let seen = screen.visible();
    assert_eq!(seen.len(), 3, "{seen:?}");
    assert_eq!(seen[0], "a message");
    assert!(seen[1].starts_with("step 550/1000 ██"), "{seen:?}");
    assert!(seen[1].ends_with("loss 0.0312  160 img/s  1m 30s left"), "{seen:?}");
    assert!(seen[2].starts_with("sampling ██") && seen[2].contains(" 25/50 "), "{seen:?}");
    drop(sampling);
    assert_eq!(screen.visible().len(), 2, "{:?}", screen.visible());
    drop(training);
    console.last("done");
    assert_eq!(screen.visible(), ["a message", "done"]);
}

#[test]
fn a_quiet_terminal_has_no_bars() {
    let (console, screen) = terminal(Verbosity::Quiet);
    speak(&console);
    assert_eq!(screen.text(), "warning: disk full\nerror: diverged\ndone\n");
}

#[test]
fn threads_count_together() {
    let (console, screen) = plain(Verbosity::Normal, Duration::ZERO);
    let bar = console.bar("decoding", 400);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..100).for_each(|_| bar.inc(1)));
        }
    });
    assert_eq!(screen.text().lines().count(), 400);
    assert!(screen.text().ends_with("decoding 400/400\n"));
}

#[test]
fn a_closed_pipe_is_no_reason_to_stop() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }
    let out = Arc::new(Mutex::new(Closed));
    speak(&Console::with(Verbosity::Verbose, ProgressDrawTarget::hidden(), out, Duration::ZERO));
}

#[test]
fn times_in_two_units() {
    let cases = [
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (200.0, "3m 20s"),
        (3600.0, "1h 00m"),
        (7500.0, "2h 05m"),
        (86400.0 * 4.0 + 3.0 * 3600.0, "4d 03h"),
    ];
    for (seconds, expected) in cases {
        assert_eq!(duration(Duration::from_secs_f64(seconds)), expected);
    }
}

#[test]
fn flags() {
    assert_eq!(Verbosity::from_flags(false, false), Verbosity::Normal);
    assert_eq!(Verbosity::from_flags(false, true), Verbosity::Verbose);
    assert_eq!(Verbosity::from_flags(true, true), Verbosity::Quiet);
}
