// Messages of cachalot.v1 to calls of the generator, and its events to messages.
#ifndef CACHALOT_SERVER_GRPC_PROTO_CALLS_H_
#define CACHALOT_SERVER_GRPC_PROTO_CALLS_H_

#include "absl/status/statusor.h"
#include "cachalot/v1/cachalot.pb.h"
#include "server/text/generate.h"

namespace cachalot {

// The calls that requests ask for. InvalidArgument naming the field (see request_error.h) for what the generator could
// not tell is wrong: a prompt that is missing, a role that does not exist, a negative number that means something to
// it.
absl::StatusOr<GenerateCall> ToCall(const v1::CompleteRequest& request, const SamplingParams& defaults);
absl::StatusOr<GenerateCall> ToCall(const v1::ChatRequest& request, const SamplingParams& defaults);
absl::StatusOr<ChatPrompt> ToChatPrompt(const v1::ChatPrompt& prompt);

// How many answers a request asks for: InvalidArgument ("n") unless 1 to 128.
absl::StatusOr<int> NumAnswers(const v1::CompleteRequest& request);
absl::StatusOr<int> NumAnswers(const v1::ChatRequest& request);

// Continues a response with a further event of its answer. Not for kCancelled and kError.
void Append(GenerateEvent event, v1::CompleteResponse* response);
void Append(GenerateEvent event, v1::ChatResponse* response);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_GRPC_PROTO_CALLS_H_
