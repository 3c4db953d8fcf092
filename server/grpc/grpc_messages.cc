// Messages are serialized in one piece: an answer's are small, and a reused buffer would be copied anyway.
#include "server/grpc/grpc_messages.h"

#include <grpcpp/support/slice.h>

#include <limits>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/request_error.h"

namespace cachalot {

absl::Status ParseMessage(const grpc::ByteBuffer& buffer, google::protobuf::MessageLite* message) {
  grpc::Slice slice;
  if (!buffer.TrySingleSlice(&slice).ok() && !buffer.DumpToSingleSlice(&slice).ok()) {
    return absl::ResourceExhaustedError("the request cannot be read");
  }
  const bool fits = slice.size() <= static_cast<size_t>(std::numeric_limits<int>::max());
  if (fits && message->ParseFromArray(slice.begin(), static_cast<int>(slice.size()))) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the request is not a well-formed ", message->GetTypeName(),
                                                 ": it is damaged, or one of its strings is not valid UTF-8"));
}

grpc::ByteBuffer SerializeMessage(const google::protobuf::MessageLite& message) {
  const grpc::Slice slice(message.ByteSizeLong());
  message.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return grpc::ByteBuffer(&slice, 1);
}

grpc::Status ToGrpcStatus(const absl::Status& status, grpc::CallbackServerContext* context) {
  if (status.ok()) return grpc::Status::OK;
  std::string message(status.message());
  if (const std::string field = ErrorField(status); !field.empty()) {
    context->AddTrailingMetadata("cachalot-field", field);
    if (!absl::StrContains(message, field)) message = absl::StrCat(field, ": ", message);
  }
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message);
}

}  // namespace cachalot
