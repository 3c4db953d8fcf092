// What every method needs: bytes to messages and back, errors to gRPC's status.
#ifndef CACHALOT_SERVER_GRPC_GRPC_MESSAGES_H_
#define CACHALOT_SERVER_GRPC_GRPC_MESSAGES_H_

#include <google/protobuf/message_lite.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace cachalot {

// InvalidArgument for bytes that are no such message, or have ill-formed UTF-8 in a string.
absl::Status ParseMessage(const grpc::ByteBuffer& buffer, google::protobuf::MessageLite* message);
grpc::ByteBuffer SerializeMessage(const google::protobuf::MessageLite& message);

// The one mapping from absl::Status to gRPC: the codes are the same and the message is kept. The field of a request
// that the error is about goes into the message, unless it is there, and into trailing metadata as "cachalot-field".
// Nothing may have been finished on `context` before.
grpc::Status ToGrpcStatus(const absl::Status& status, grpc::CallbackServerContext* context);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_GRPC_GRPC_MESSAGES_H_
