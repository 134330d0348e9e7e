//! For the fuzz targets only: what a client sends, without a socket and without a VM.

use super::codec::{Codec, Frame};
use super::descriptors::Descriptors;
use super::{commands, message};

/// Takes `reads`, as a client's stream would be cut, to the point where a command would be carried out. Returns the answers of
/// what was refused.
pub fn stream<'a>(reads: impl IntoIterator<Item = (&'a [u8], bool)>) -> Vec<String> {
    let (mut codec, mut answers) = (Codec::default(), Vec::new());
    let descriptors = Descriptors::default();
    for (read, more) in reads {
        for frame in codec.push(read, more) {
            let (id, error) = match frame {
                Frame::Bad(why) => (None, message::QmpError::generic(why)),
                Frame::Request(text) => match message::parse(&text) {
                    Err((id, error)) => (id, error),
                    Ok(request) => match commands::resolve(&request, &descriptors) {
                        Ok(_) => continue,
                        Err(error) => (request.id, error),
                    },
                },
            };
            let mut answer = String::new();
            message::encode_reply(&mut answer, Err(&error), id.as_ref());
            answers.push(answer);
        }
    }
    answers
}
