//! A guest's console as a test sees it: wait for words, type lines. On any stream: a socket, a pty, `flotilla console`.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A console, with all that it has printed so far.
#[derive(Debug)]
pub struct Console {
    stream: UnixStream,
    text: String,
    /// How much of the text earlier waits have used up.
    seen: usize,
}

impl Console {
    /// Takes a connected stream.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, text: String::new(), seen: 0 }
    }

    /// All that was printed so far.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Waits until `words` come, after those of the wait before; returns their line, as far as it has come.
    ///
    /// # Errors
    /// After `limit`, or when the stream ends: with the newest text.
    pub fn expect(&mut self, words: &str, limit: Duration) -> io::Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.text[self.seen..].find(words) {
                let (start, end) = (self.seen + at, self.seen + at + words.len());
                self.seen = end;
                let line = self.text[..start].rfind('\n').map_or(0, |n| n + 1);
                let rest = self.text[end..].find('\n').map_or(self.text.len(), |n| end + n);
                return Ok(self.text[line..rest].trim_end().to_owned());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let newest = self.text.len().saturating_sub(1500);
            let newest = self.text.get(newest..).unwrap_or(&self.text);
            let fail = |what: &str| {
                io::Error::other(format!("console: no \"{words}\" {what}; newest text:\n{newest}"))
            };
            if left.is_zero() {
                return Err(fail(&format!("within {limit:?}")));
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(fail("before its end")),
                Ok(n) => self.text.push_str(&String::from_utf8_lossy(&buffer[..n])),
                // EINTR: a child's end meets a thread's start. glibc blocks all signals while it starts a thread, and a signal that is
                // blocked in the first thread goes to another one, even one that all ignore.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// As [`Console::expect`], and waits for the line's end: returns all of it.
    ///
    /// # Errors
    /// As for [`Console::expect`].
    pub fn expect_line(&mut self, words: &str, limit: Duration) -> io::Result<String> {
        self.expect(words, limit)?;
        let start = self.text[..self.seen].rfind('\n').map_or(0, |n| n + 1);
        self.expect("\n", limit)?;
        Ok(self.text[start..self.seen].trim_end().to_owned())
    }

    /// Types a line.
    ///
    /// # Errors
    /// When the stream is closed.
    pub fn enter(&mut self, line: &str) -> io::Result<()> {
        self.stream.write_all(format!("{line}\n").as_bytes())
    }

    /// Runs a line in the guest's shell and returns what it printed. The echo of the line is told from the answer by a
    /// mark that the shell puts together.
    ///
    /// # Errors
    /// As for [`Console::expect`].
    pub fn shell(&mut self, line: &str, limit: Duration) -> io::Result<String> {
        self.enter(&format!("echo be''gin; {line}; echo e''nd-of-line $?"))?;
        self.expect("begin", limit)?;
        let start = self.seen;
        self.expect("end-of-line ", limit)?;
        let end = self.seen;
        self.expect("\n", limit)?;
        let text = self.text[start..end - "end-of-line ".len()].replace('\r', "").trim().to_owned();
        match self.text[end..self.seen].trim() {
            "0" => Ok(text),
            code => Err(io::Error::other(format!("in the guest, `{line}` exited with {code}: {text}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn waits_use_text_up_in_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut console = Console::new(ours);
        theirs.write_all(b"one\r\nguest web up, uptime 5.1\r\nlogin").unwrap();
        assert_eq!(console.expect("guest web up", SOON).unwrap(), "guest web up, uptime 5.1");
        drop(theirs);
        let error = console.expect("one", SOON).unwrap_err().to_string();
        assert!(error.contains("before its end") && error.contains("login"), "{error}");
    }

    #[test]
    fn the_echo_is_not_the_answer() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut console = Console::new(ours);
        theirs
            .write_all(b"# echo be''gin; nproc; echo e''nd-of-line $?\r\nbegin\r\n2\r\nend-of-line 0\r\n# ")
            .unwrap();
        assert_eq!(console.shell("nproc", SOON).unwrap(), "2");
        theirs.write_all(b"begin\r\nno\r\nend-of-line 1\r\n").unwrap();
        assert!(console.shell("false", SOON).unwrap_err().to_string().contains("exited with 1: no"));
    }
}
